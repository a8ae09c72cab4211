"""Digests: stable over time and processes, and different for plans that differ anywhere."""

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from protos.digest import DIGEST_BYTES, mesh_digest, shard_digest
from protos.plan_pb2 import ShardPlan


def some_value(field: FieldDescriptor, number: int) -> Any:
    kinds: dict[int, Any] = {
        FieldDescriptor.CPPTYPE_STRING: b"x" * number if field.type == FieldDescriptor.TYPE_BYTES else "x" * number,
        FieldDescriptor.CPPTYPE_BOOL: bool(number % 2),
    }
    return kinds.get(field.cpp_type, number)


def fill(message: Message, oneof_index: int = 0) -> None:
    """Set every field of the message and of those inside; of a oneof, the field of that index."""
    for field in message.DESCRIPTOR.fields:
        if field.containing_oneof and list(field.containing_oneof.fields).index(field) != oneof_index:
            continue
        value = getattr(message, field.name)
        if field.message_type:
            fill(value.add() if field.is_repeated else value, oneof_index)
        elif field.is_repeated:
            value.append(some_value(field, 1))
        else:
            setattr(message, field.name, some_value(field, 1))


def leaves(message: Message, path: str = "") -> Iterator[tuple[str, Message, FieldDescriptor]]:
    for field, value in message.ListFields():
        if field.message_type:
            for part in value if field.is_repeated else (value,):
                yield from leaves(part, f"{path}.{field.name}")
        else:
            yield f"{path}.{field.name}", message, field


def full_plan(oneof_index: int = 0) -> ShardPlan:
    plan = ShardPlan()
    fill(plan, oneof_index)
    return plan


@pytest.mark.parametrize("oneof_index", [0, 1])
def test_every_field_of_a_plan_counts(oneof_index: int) -> None:
    digests = {shard_digest(full_plan(oneof_index))}
    paths = [path for path, _, _ in leaves(full_plan(oneof_index))]
    for index, _ in enumerate(paths):
        plan = full_plan(oneof_index)
        _, message, field = list(leaves(plan))[index]
        if field.is_repeated:
            getattr(message, field.name).append(some_value(field, 2))
        else:
            setattr(message, field.name, some_value(field, 2))
        digests.add(shard_digest(plan))
    assert len(digests) == 1 + len(paths) > 100


def test_the_digest_of_a_plan_never_changes() -> None:
    plan = ShardPlan(shard=1, num_shards=2, dtype=1, quantization=1, hidden=576, page_tokens=16)
    plan.attention.rope.inverse_frequencies.extend([1.0, 0.5, 0.25])
    plan.heads.end = 5
    # Written by hand from protobuf's encoding: what every version of the library must come to.
    encoded = bytes.fromhex("0801 1002 1801 2001 28c004 3210 420e 120c 0000803f 0000003f 0000803e 3a02 1005 6810")
    assert shard_digest(plan) == hashlib.sha256(encoded).digest()


def test_equal_plans_have_equal_digests_however_they_were_made() -> None:
    first = ShardPlan(shard=1, hidden=64)
    second = ShardPlan(hidden=64)
    second.shard = 1
    assert shard_digest(first) == shard_digest(second) == shard_digest(ShardPlan.FromString(second.SerializeToString()))


def test_the_mesh_digest_hashes_the_shards_in_their_order() -> None:
    one, two = b"1" * DIGEST_BYTES, b"2" * DIGEST_BYTES
    assert mesh_digest([one, two]) == hashlib.sha256(one + two).digest()
    assert mesh_digest([one, two]) != mesh_digest([two, one])
    assert len(mesh_digest([one])) == DIGEST_BYTES
