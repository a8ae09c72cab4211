"""Fingerprints of files: what they notice, and that they read little."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.fingerprint import HEAD_BYTES, NUM_SAMPLES, SAMPLE_BYTES, file_fingerprint

SIZE = 3 * HEAD_BYTES


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def write(path: Path, contents: bytes) -> Path:
    path.write_bytes(contents)
    return path


@pytest.mark.parametrize("size", [0, 1, SAMPLE_BYTES - 1, SAMPLE_BYTES, HEAD_BYTES, SIZE + 1])
def test_equal_contents_have_equal_fingerprints_under_any_name(tmp_path: Path, size: int) -> None:
    contents = os.urandom(size)
    first, second = write(tmp_path / "a", contents), write(tmp_path / "b", contents)
    assert file_fingerprint(first) == file_fingerprint(second)
    assert len(file_fingerprint(first)) == 32


def test_a_longer_file_of_zeros_is_another(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", bytes(SIZE)), write(tmp_path / "b", bytes(SIZE + 1))
    assert file_fingerprint(first) != file_fingerprint(second)


@pytest.mark.parametrize("position", [0, 8, HEAD_BYTES - 1, SIZE - SAMPLE_BYTES, SIZE - 1])
def test_one_byte_of_the_head_or_the_tail_counts(tmp_path: Path, position: int) -> None:
    contents = bytearray(SIZE)
    first = file_fingerprint(write(tmp_path / "a", bytes(contents)))
    contents[position] = 1
    assert file_fingerprint(write(tmp_path / "b", bytes(contents))) != first


SPACING = (SIZE - SAMPLE_BYTES) // (NUM_SAMPLES - 1) + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fingerprint")
    write(folder / "zeros", bytes(SIZE))
    return folder


@given(start=st.integers(0, SIZE - SPACING))
def test_a_tensor_that_was_trained_on_is_noticed(folder: Path, start: int) -> None:
    contents = bytearray(SIZE)
    contents[start : start + SPACING] = b"\x01" * SPACING
    assert file_fingerprint(write(folder / "tuned", bytes(contents))) != file_fingerprint(folder / "zeros")


def test_little_of_a_big_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(2**40)
    read = []
    pread = os.pread

    def counting(descriptor: int, size: int, offset: int) -> bytes:
        read.append(size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counting)
    file_fingerprint(path)
    assert sum(read) <= HEAD_BYTES + NUM_SAMPLES * SAMPLE_BYTES


def test_a_missing_file_is_an_os_error_and_no_descriptor_stays_open(tmp_path: Path) -> None:
    before = open_descriptors()
    with pytest.raises(FileNotFoundError):
        file_fingerprint(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        file_fingerprint(tmp_path)
    assert open_descriptors() == before
