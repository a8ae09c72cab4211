from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from protos.errors import ModelError
from shardworker.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from pathlib import Path


def test_tensors_lie_where_the_library_put_them(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.zeros(0, 4), "d": torch.randn(2, 2, 2).half()}
    save_file(tensors, tmp_path / "f", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "f", "f") as file:
        assert {name: tuple(t.shape) for name, t in tensors.items()} == {name: s.shape for name, s in file.tensors.items()}
        for name, tensor in tensors.items():
            buffer = bytearray(tensor.nbytes)
            file.read_into(file.tensors[name].offset, memoryview(buffer))
            assert bytes(buffer) == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "f is no safetensors file: 0 bytes are too few"),
        (b"1234567", "f is no safetensors file: 7 bytes are too few"),
        (b"\xff" * 8, "f is no safetensors file: its header would be 18446744073709551615 bytes long"),
        ((99).to_bytes(8, "little") + b"{}", "f is truncated: its header needs 99 bytes, 2 are left"),
        ((2).to_bytes(8, "little") + b"[]", r"f: header must hold a JSON object, found \[\]"),
        ((2).to_bytes(8, "little") + b"{}x", "f is damaged: its tensors end at byte 10, it has 11"),
    ],
)
def test_a_foreign_or_cut_file_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ModelError, match=f"^checkpoint file {text}"):
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
