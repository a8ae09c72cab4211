"""Headers of safetensors files: what the library writes is read, what lies is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save

from protos.errors import ModelError
from protos.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, TensorEntry, header_length, parse_header


def entry(begin: Any = 0, end: Any = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def parse(header: Any, data_bytes: int = 8) -> dict[str, TensorEntry]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(text, 8 + len(text) + data_bytes, file="f", source="somewhere/f")


def test_what_the_library_writes_is_read() -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.zeros(0, 4),
        "d": torch.randn(2, 2).to(torch.float8_e4m3fn),
        "e": torch.tensor(3),
        "f": torch.tensor([True, False]),
    }
    data = save(tensors, metadata={"format": "pt"})
    length = header_length(data[:LENGTH_BYTES], len(data), "x")
    found = parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data), file="x.safetensors", source="x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = found[name]
        assert (entry.name, entry.file, entry.shape) == (name, "x.safetensors", tuple(tensor.shape))
        stored = data[entry.offset : entry.offset + entry.num_bytes]
        assert stored == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert [entry.dtype for entry in found.values()].count("F8_E4M3") == 1


UNSOUND = {
    "not json": b"{",
    "no object": b"[]",
    "not utf-8": b'{"\xff": 1}',
    "deep": b"[" * 100_000,
    "twice": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "nan": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}',
    "infinity": b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}',
    "overlap": {"a": entry(), "b": entry(4, 12)},
    "hole": {"a": entry(0, 8), "b": entry(9, 17)},
    "same place": {"a": entry(), "b": entry()},
    "late start": {"a": entry(8, 16)},
    "shape lies": {"a": entry(shape=(3,))},
    "negative": {"a": entry(-8, 0)},
    "backwards": {"a": entry(8, 0)},
    "fraction": {"a": entry(0.0, 8.0)},
    "boolean": {"a": entry(False, 8)},
    "huge": {"a": entry(shape=(2**62, 2**62))},
    "negative shape": {"a": entry(shape=(-1, -2))},
    "unknown dtype": {"a": entry(dtype="F31")},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "null": {"a": None},
    "many dimensions": {"a": entry(shape=(1,) * 9)},
    "three offsets": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 16]}},
    "long name": {"a" * 2000: entry()},
    "half a byte": {"a": entry(0, 2, "F4", (3,))},
}


@pytest.mark.parametrize("header", UNSOUND.values(), ids=UNSOUND.keys())
def test_an_unsound_header_is_refused(header: Any) -> None:
    with pytest.raises(ModelError, match=r"^somewhere/f: header") as error:
        parse(header)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data_bytes", "text"), [(7, "is truncated: its tensors need"), (9, "is damaged: its tensors end at byte")]
)
def test_data_of_another_length_is_refused(data_bytes: int, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        parse({"a": entry()}, data_bytes)


@pytest.mark.parametrize(
    ("length", "file_bytes", "text"),
    [
        (0, 7, "no safetensors file: 7 bytes are too few"),
        (MAX_HEADER_BYTES + 1, 10**12, "no safetensors file: its header would be 100000001 bytes long"),
        (100, 107, "truncated: its header needs 100 bytes, 99 are left"),
    ],
)
def test_a_length_that_cannot_be_is_refused(length: int, file_bytes: int, text: str) -> None:
    with pytest.raises(ModelError, match=f"^f is {text}"):
        header_length(length.to_bytes(8, "little"), file_bytes, "f")
    assert header_length((100).to_bytes(8, "little"), 108, "f") == 100
