from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from protos.errors import ModelError
from shardworker.safetensors_file import SafetensorsFile, parse_header

if TYPE_CHECKING:
    from pathlib import Path


def entry(begin: Any = 0, end: Any = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def parse(header: Any, data_bytes: int = 8) -> Any:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(text, "f", 8 + len(text) + data_bytes)


def test_tensors_lie_where_the_library_put_them(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.zeros(0, 4), "d": torch.randn(2, 2, 2).half()}
    save_file(tensors, tmp_path / "f", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "f", "f") as file:
        assert {name: tuple(t.shape) for name, t in tensors.items()} == {name: s.shape for name, s in file.tensors.items()}
        for name, tensor in tensors.items():
            buffer = bytearray(tensor.nbytes)
            file.read_into(file.tensors[name].offset, memoryview(buffer))
            assert bytes(buffer) == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


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
}


@pytest.mark.parametrize("header", UNSOUND.values(), ids=UNSOUND.keys())
def test_an_unsound_header_is_refused(header: Any) -> None:
    with pytest.raises(ModelError, match="checkpoint file f"):
        parse(header)


@pytest.mark.parametrize(("data_bytes", "text"), [(7, "truncated: wanted 8 bytes of data, found 7"), (9, "longer")])
def test_data_of_another_length_is_refused(data_bytes: int, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        parse({"a": entry()}, data_bytes)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 8, (99).to_bytes(8, "little") + b"{}"])
def test_a_foreign_or_cut_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ModelError, match="checkpoint file f is truncated"):
        SafetensorsFile(tmp_path / "f", "f")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="not a regular file"):
        SafetensorsFile(tmp_path / "pipe", "pipe")
    with pytest.raises(ModelError, match="cannot open checkpoint file gone"):
        SafetensorsFile(tmp_path / "gone", "gone")


def test_a_file_that_shrinks_later_is_reported(tmp_path: Path) -> None:
    save_file({"a": torch.randn(4)}, tmp_path / "f")
    with SafetensorsFile(tmp_path / "f", "f") as file:
        os.truncate(tmp_path / "f", file.size - 4)
        with pytest.raises(ModelError, match="is truncated: wanted bytes up to"):
            file.read_into(file.tensors["a"].offset, memoryview(bytearray(16)))
