import random
import struct
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.gguf_import import import_gguf
from coordinator.gguf_import.header import read_gguf
from protos.errors import ModelError
from tests.coordinator.tiny_gguf import Model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return Model().write(tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes()


def test_header_equals_the_packages_reading(tmp_path: Path) -> None:
    file = Model().write(tmp_path / "m.gguf")
    ours, theirs = read_gguf(file), gguf.GGUFReader(file)
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.offset, found.num_bytes, found.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
    wanted = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata._values == wanted


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def head(tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def tensor(name: bytes = b"x", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HUGE = 2**62

HOSTILE = {
    "empty": (b"", "cannot be read"),
    "foreign": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "short": (b"GGUF\x03", "truncated"),
    "version 1": (head(version=1), "found version 1"),
    "big-endian": (head(version=0x03000000), "big-endian"),
    "many values": (head(values=HUGE), "truncated"),
    "many tensors": (head(tensors=HUGE), "truncated"),
    "long key": (head(values=1) + struct.pack("<Q", HUGE), "truncated"),
    "long text": (head(values=1) + string(b"k") + struct.pack("<IQ", 8, HUGE), "truncated"),
    "long array": (head(values=1) + string(b"k") + struct.pack("<IIQ", 9, 0, HUGE), "truncated"),
    "long array of texts": (head(values=1) + string(b"k") + struct.pack("<IIQ", 9, 8, HUGE), "truncated"),
    "array of arrays": (head(values=1) + string(b"k") + struct.pack("<IIQ", 9, 9, 1), "array of arrays"),
    "unknown value": (head(values=1) + string(b"k") + struct.pack("<I", 77), "value type 77"),
    "bad text": (head(values=1) + string(b"\xff") + struct.pack("<II", 4, 1), "not UTF-8"),
    "twice": (head(values=2) + (string(b"k") + struct.pack("<II", 4, 1)) * 2, "k is given twice"),
    "alignment": (head(values=1) + string(b"general.alignment") + struct.pack("<II", 4, 3), "power of two, found 3"),
    "no dimensions": (head(1) + tensor(dims=()), "1 to 4 dimensions, found 0"),
    "many dimensions": (head(1) + string(b"x") + struct.pack("<I", 2**31), "1 to 4 dimensions"),
    "unknown quantization": (head(1) + tensor(kind=99), "type 99"),
    "odd row": (head(1) + tensor(dims=(33,), kind=2), r"cannot have shape \[33\]"),
    "no elements": (head(1) + tensor(dims=(32, 0)), "cannot have shape"),
    "beyond the end": (head(1) + tensor(offset=HUGE) + bytes(1000), "truncated: tensor x"),
    "huge": (head(1) + tensor(dims=(2**40, 2**40)) + bytes(1000), "truncated: tensor x"),
    "same tensor": (head(2) + tensor() * 2 + bytes(1000), "x is listed twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_clear_line(tmp_path: Path, name: str) -> None:
    content, wanted = HOSTILE[name]
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=wanted) as caught:
        import_gguf(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@given(share=st.floats(0, 0.999))
@settings(max_examples=60, deadline=None)
def test_a_file_cut_anywhere_is_a_model_error(good: bytes, tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = tmp_path_factory.mktemp("cut")
    (folder / "m.gguf").write_bytes(good[: int(len(good) * share)])
    with pytest.raises(ModelError):
        import_gguf(folder / "m.gguf", folder / "out")
    assert [path.name for path in folder.iterdir()] == ["m.gguf"]


@given(seed=st.integers(0, 2**32), flips=st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_flipped_bits_in_the_header_are_a_model_error_or_harmless(
    good: bytes, tmp_path_factory: pytest.TempPathFactory, seed: int, flips: int
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    content, choose = bytearray(good), random.Random(seed)  # noqa: S311  # for a test
    for _ in range(flips):
        content[choose.randrange(8000)] ^= 1 << choose.randrange(8)
    (folder / "m.gguf").write_bytes(content)
    try:
        import_gguf(folder / "m.gguf", folder / "out")
    except ModelError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "\n" not in refusal
    assert (folder / "out").exists() == (not refusal)


@pytest.mark.parametrize("make", [Path.mkdir, lambda _: None], ids=["folder", "missing"])
def test_what_is_no_file_is_a_model_error(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="cannot be read"):
        read_gguf(tmp_path / "m.gguf")
