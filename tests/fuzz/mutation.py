"""Changes of sound messages, of their bytes and of their fields: what is almost right goes furthest."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor import FieldDescriptor as Field

from protos import tensor_pb2
from protos.errors import InvalidArgument
from protos.tensors import num_bytes

if TYPE_CHECKING:
    from random import Random

    from google.protobuf.message import Message

WHOLE = (
    0,
    1,
    2,
    3,
    7,
    16,
    31,
    255,
    2**15,
    2**16,
    2**24,
    2**30,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
REAL = (0.0, -0.0, 1.0, -1.0, 1e-5, 1e-46, 1e-308, 1e300, 1.7e308, -1e30, math.nan, math.inf, -math.inf, 0.5, 2.0, 100.0)
TEXTS = (
    "",
    "a",
    "\0",
    "é" * 50,
    "😀\u202e",
    "x" * 5000,
    "../../etc/passwd",
    "{expert}",
    "%s%n{0}",
    "\n\r\t",
    "{{ 7*7 }}",
    "<|im_end|>",
)

_BITS = {
    Field.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    Field.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    Field.CPPTYPE_UINT32: (0, 2**32 - 1),
    Field.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Flip, cut, insert, repeat."""
    result = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 5, 20))):
        at = random.randrange(len(result) + 1)
        end = min(len(result), at + random.choice((1, 1, 2, 4, 8, 100)))
        match random.randrange(6):
            case 0 if result:
                result[at % len(result)] ^= 1 << random.randrange(8)
            case 1 if result:
                result[at % len(result)] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
            case 2:
                del result[at:end]
            case 3:
                result[at:at] = random.choice((random.randbytes(9), b"\xff" * 10, b"\x00" * 8, result[at:end]))
            case 4:
                # A length or number of 1 GB and more, as a varint.
                result[at:end] = b"\xff\xff\xff\xff" + bytes((random.randrange(16),))
            case _:
                del result[random.randrange(len(result) + 1) :]
    return bytes(result)


def mutate(random: Random, message: Message) -> None:
    """Change a message somewhere, at any depth."""
    if isinstance(message, tensor_pb2.Tensor) and random.random() < 0.6:
        rebuild(random, message)
        return
    fields = list(message.DESCRIPTOR.fields)
    present = [field for field, _ in message.ListFields()]
    if not fields:
        return
    field = random.choice(present if present and random.random() < 0.8 else fields)
    if field.is_repeated:
        _mutate_repeated(random, message, field)
    elif field.cpp_type == Field.CPPTYPE_MESSAGE:
        if random.random() < 0.1:
            message.ClearField(field.name)
        else:
            below = getattr(message, field.name)
            below.SetInParent()
            mutate(random, below)
    elif random.random() < 0.1:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _value(random, field, getattr(message, field.name)))


def rebuild(random: Random, tensor: tensor_pb2.Tensor) -> None:
    """Make another tensor of it: any dtype and shape, with data that fits, almost fits, or is hostile."""
    if random.random() < 0.5 or not tensor.shape:
        tensor.dtype = random.choice((0, 1, 2, 3, 4, 5, 6, 99))
    if random.random() < 0.5 or not tensor.shape:
        at = random.randrange(5)
        shape = list(tensor.shape)
        shape[at : at + random.randrange(2)] = [random.choice((0, 1, 2, 3, 5, 32, 128, 2**20, 2**30, 2**31 - 1, 2**32 - 1))]
        del tensor.shape[:]
        tensor.shape.extend(shape)
    try:
        wanted = num_bytes(tensor.dtype, tuple(tensor.shape)) if tensor.shape else 0
    except InvalidArgument:
        wanted = len(tensor.data)
    if wanted < 2**20:
        fill = random.choice(
            (b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\xff" * 4, b"\0" * 4, struct.pack("<i", random.randrange(64)))
        )
        whole = (fill * (wanted // 4 + 1))[:wanted] if random.random() < 0.5 else random.randbytes(wanted)
        tensor.data = whole + b"x" * random.choice((0, 0, 0, 1)) if random.random() < 0.8 else tensor.data


def _mutate_repeated(random: Random, message: Message, field: Field) -> None:
    items: Any = getattr(message, field.name)
    choice = random.randrange(6)
    if choice == 0 or (field.message_type is not None and field.message_type.GetOptions().map_entry):
        message.ClearField(field.name)
    elif choice == 1 and items:
        del items[random.randrange(len(items))]
    elif choice in (2, 3) and items:
        again = random.choice(items)
        for _ in range(random.choice((1, 1, 2, 17, 300))):
            items.append(again) if field.cpp_type != Field.CPPTYPE_MESSAGE else items.add().CopyFrom(again)
    elif field.cpp_type == Field.CPPTYPE_MESSAGE:
        mutate(random, random.choice(items) if items else items.add())
    elif items:
        at = random.randrange(len(items))
        items[at] = _value(random, field, items[at])
    else:
        items.append(_value(random, field, None))


def _value(random: Random, field: Field, now: Any) -> Any:
    kind = field.cpp_type
    if kind in _BITS:
        least, most = _BITS[kind]
        near = (now or 0) + random.choice((-1, 1, 2, -2))
        return min(most, max(least, random.choice((near, near, -1, *WHOLE, random.randint(least, most)))))
    if kind == Field.CPPTYPE_ENUM:
        return random.choice((0, 1, 2, 3, 4, 5, 6, 7, 99, 2**31 - 1, -1))
    if kind == Field.CPPTYPE_BOOL:
        return not now
    if kind == Field.CPPTYPE_FLOAT:
        return random.choice([value for value in REAL if math.isnan(value) or math.isinf(value) or abs(value) < 3e38])
    if kind == Field.CPPTYPE_DOUBLE:
        return random.choice(REAL)
    if field.type == Field.TYPE_BYTES:
        return random.choice((b"", mutate_bytes(random, now or b""), bytes(32), b"x" * 5000))
    return random.choice((*TEXTS, (now or "")[: random.randrange(8)], (now or "") * 3))
