"""Which files of a model's folder are opened."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from protos.errors import ModelError
from protos.model_files import read_model_file

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    return path


def test_a_file_is_read_up_to_its_limit(folder: Path) -> None:
    (folder / "a").write_bytes(b"12345")
    assert read_model_file(folder / "a", 5) == b"12345"
    with pytest.raises(ModelError, match=r"a: 5 bytes are too many, at most 4 are read"):
        read_model_file(folder / "a", 4)


def test_links_within_the_folder_are_followed(folder: Path) -> None:
    # As Kubernetes shows a volume's files.
    (folder / "..2026").mkdir()
    (folder / "..2026" / "a").write_bytes(b"x")
    (folder / "..data").symlink_to("..2026")
    (folder / "a").symlink_to("..data/a")
    assert read_model_file(folder / "a", 10) == b"x"


def test_links_to_blobs_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--owner--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_bytes(b"x")
    (snapshot / "a").symlink_to("../../blobs/abc")
    (tmp_path / "link").symlink_to(snapshot)
    assert read_model_file(snapshot / "a", 10) == read_model_file(tmp_path / "link" / "a", 10) == b"x"


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "../blobs/a", "../model2/a"])
def test_links_out_of_the_folder_are_refused(folder: Path, target: str) -> None:
    for name in ("secret", "blobs/a", "model2/a"):
        path = folder.parent / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    (folder / "a").symlink_to(target)
    with pytest.raises(ModelError, match="neither in the model's folder nor in the hub's cache"):
        read_model_file(folder / "a", 10)


ODD: dict[str, Any] = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "nothing": lambda path: path.symlink_to("b"),
    "itself": lambda path: path.symlink_to("a"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_regular_file_is_refused_at_once(folder: Path, odd: str) -> None:
    ODD[odd](folder / "a")
    with pytest.raises(ModelError, match=r"is not a regular file|cannot be read"):
        read_model_file(folder / "a", 10)


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_model_file(folder / name, 10)
