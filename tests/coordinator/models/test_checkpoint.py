from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from coordinator.models.checkpoint import Checkpoint, has_weights
from protos.errors import ModelError
from protos.fingerprint import file_fingerprint
from protos.safetensors_header import MAX_HEADER_BYTES
from tests import tiny


def write(directory: Path, header: Any, data: bytes = b"", *, name: str = "model.safetensors") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = directory / name
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(begin: int, end: int, shape: list[Any] | None = None, dtype: object = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("name", ["llama_sharded", "qwen3_moe_fused", "llama_bf16", "glm4_moe_qk_norm"])
def test_entries_agree_with_the_safetensors_library(name: str, tmp_path: Path) -> None:
    tiny.make_checkpoint(name, tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert [file.name for file in checkpoint.files] == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    found = set()
    for file in checkpoint.files:
        assert file.size == (tmp_path / file.name).stat().st_size
        assert file.fingerprint == file_fingerprint(tmp_path / file.name)
        with safe_open(tmp_path / file.name, framework="pt") as reference:
            for key in reference.keys():  # noqa: SIM118  # no mapping
                entry = checkpoint.tensors[key]
                wanted = reference.get_tensor(key)
                assert (entry.file, entry.shape) == (file.name, tuple(wanted.shape))
                assert checkpoint.read(key) == wanted.contiguous().view(torch.uint8).numpy().tobytes()
                found.add(key)
    assert found == set(checkpoint.tensors)


def test_rows_can_be_mapped(tmp_path: Path) -> None:
    table = torch.randn(7, 5)
    save_file({"other": torch.ones(3), "table": table}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    entry = checkpoint.tensors["table"]
    mapped = np.memmap(checkpoint.directory / entry.file, np.float32, "r", entry.offset, entry.shape)
    assert np.array_equal(mapped[4], table[4].numpy())


def test_single_file_goes_before_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"b": "b.safetensors"}}')
    assert list(Checkpoint.open(tmp_path).tensors) == ["a"]


def test_of_indexed_files_only_what_the_index_names_counts(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.zeros(3)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors["b"].file == "2.safetensors"


def test_unknown_tensor_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="has no tensor 'b'"):
        Checkpoint.open(tmp_path).read("b")


def test_file_that_changed_since_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 90)
    with pytest.raises(ModelError, match=r"has changed since its header was read: it had .* bytes, found 90"):
        checkpoint.read("a")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        checkpoint.read("a")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "header is not valid JSON"),
        (b"\xff\xfe", b"", "header is not valid JSON"),
        (b'{"a": NaN}', b"", "NaN is not a JSON number"),
        (b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}', b"", "Infinity is not a JSON number"),
        (b"[]", b"", "header must hold a JSON object"),
        (b'{"a": 1, "a": 2}', b"", 'key "a" occurs twice'),
        ({"a": 1}, b"", "tensor 'a' must have one of the dtypes .*, found null"),
        ({"a": tensor(0, 4, dtype="F31")}, bytes(4), "tensor 'a' must have one of the dtypes .*, found \"F31\""),
        ({"a": tensor(0, 4, dtype=["F32"])}, bytes(4), "tensor 'a' must have one of the dtypes"),
        ({"a": tensor(0, 4, shape=[-1])}, bytes(4), "tensor 'a' must have a shape"),
        ({"a": tensor(0, 4, shape=[True])}, bytes(4), "tensor 'a' must have a shape"),
        ({"a": tensor(0, 4, shape=[1.0])}, bytes(4), "tensor 'a' must have a shape"),
        ({"a": tensor(0, 4, shape=[1] * 9)}, bytes(4), "tensor 'a' must have a shape of up to 8 sizes"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4), "tensor 'a' must have two data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": None}}, bytes(4), "tensor 'a' must have two data_offsets"),
        ({"a": tensor(4, 0, shape=[1])}, bytes(4), r"'a' of F32 \[1\] needs 4 bytes, its data_offsets \[4, 0\] hold -4"),
        ({"a": tensor(0, 8, shape=[3])}, bytes(8), r"'a' of F32 \[3\] needs 12 bytes, its data_offsets \[0, 8\] hold 8"),
        ({"a": tensor(0, 4, shape=[2**40, 2**40])}, bytes(4), "needs .* bytes"),
        ({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12), "tensor 'b' overlaps 'a'"),
        ({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12), "tensor 'b' leaves a hole after 'a'"),
        ({"a": tensor(4, 8)}, bytes(8), "tensor 'a' leaves a hole after the header"),
        ({"a": tensor(0, 8)}, bytes(7), "is truncated: its tensors need"),
        ({"a": tensor(0, 8)}, bytes(9), "is damaged: its tensors end at byte"),
    ],
)
def test_lying_header_is_refused(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = write(tmp_path, header, data)
    with pytest.raises(ModelError, match=message) as error:
        Checkpoint.open(tmp_path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no safetensors file: 0 bytes are too few"),
        (b"PK\x03\x04", "is no safetensors file: 4 bytes are too few"),
        (b"GGUF\x03\x00\x00\x00" * 9, "its header would be 14064895815 bytes long, at most 100000000"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), "at most 100000000 are read"),
        ((100).to_bytes(8, "little") + b"{}", "is truncated: its header needs 100 bytes, 2 are left"),
    ],
)
def test_foreign_or_truncated_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        Checkpoint.open(tmp_path)


def test_tensors_without_elements_and_metadata_are_fine(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "a": tensor(0, 0, shape=[0, 4]), "b": tensor(0, 4), "c": tensor(4, 4, shape=[0])}
    write(tmp_path, header, bytes(4))
    assert list(Checkpoint.open(tmp_path).tensors) == ["a", "b", "c"]


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json: only safetensors"):
        Checkpoint.open(tmp_path)
    assert not has_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"its \.bin files are of another format"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b", "..", ".", "", "C:x", "a\0b", 3, None, "a" * 300]
)
def test_index_that_points_outside_is_refused(tmp_path: Path, name: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ModelError, match="the file of 'w' must be a file name inside the folder, found"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}'])
def test_index_without_map_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match="must hold a weight_map from tensors to files, found none"):
        Checkpoint.open(tmp_path)


def test_index_with_an_endless_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w" * 10**6: "x.safetensors"}}))
    with pytest.raises(ModelError, match="has 1000000 characters, at most 1024"):
        Checkpoint.open(tmp_path)


def test_index_that_lies_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "1.safetensors", "c": "1.safetensors"}}))
    with pytest.raises(ModelError, match=r"says that 1\.safetensors holds 'b', but it does not \(and 1 more are missing\)"):
        Checkpoint.open(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    with pytest.raises(ModelError, match=r"2\.safetensors cannot be read: No such file"):
        Checkpoint.open(tmp_path)
    assert not has_weights(tmp_path)
    save_file({"b": torch.ones(3)}, tmp_path / "2.safetensors")
    assert has_weights(tmp_path)


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.safetensors").mkdir()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "d.safetensors"}}')
    with pytest.raises(ModelError, match=r"d\.safetensors is not a regular file"):
        Checkpoint.open(tmp_path)
