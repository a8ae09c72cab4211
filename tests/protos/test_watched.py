"""Files that change under a running program: new ones are taken, broken ones are not."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from protos import watched
from protos.errors import InvalidArgument
from protos.watched import WatchedFiles


class Number:
    """A file with a number; counts how often it was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.times = 0

    def load(self) -> list[int]:
        self.times += 1
        try:
            return [int(self.path.read_text())]
        except (ValueError, OSError):
            raise InvalidArgument("no number") from None


@pytest.fixture
def number(tmp_path: Path) -> Number:
    (tmp_path / "n").write_text("1")
    return Number(tmp_path / "n")


def test_a_file_is_read_once_as_long_as_it_does_not_change(number: Number) -> None:
    files = WatchedFiles([number.path], number.load)
    assert files.current() is files.current()
    assert files.current() == [1]
    assert number.times == 1


def test_a_broken_file_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no number"):
        WatchedFiles([tmp_path / "none"], Number(tmp_path / "none").load)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """In place of the module's own logger, which may have been used, and so be set up for good."""
    replaced = Mock()
    monkeypatch.setattr(watched, "log", replaced)
    return replaced


@pytest.mark.parametrize("how", ["in place", "by a rename", "by a link above, as Kubernetes does"])
def test_a_new_file_is_taken(tmp_path: Path, log: Mock, how: str) -> None:
    for name, text in (("old", "1"), ("new", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "n").write_text(text)
    (tmp_path / "data").symlink_to("old")
    number = Number(tmp_path / "data" / "n")
    files = WatchedFiles([number.path], number.load)
    if how == "in place":
        number.path.write_text("2")
    elif how == "by a rename":
        (tmp_path / "new" / "n").rename(number.path)
    else:
        (tmp_path / "link").symlink_to("new")
        (tmp_path / "link").rename(tmp_path / "data")
    assert files.current() == [2]
    assert files.current() == [2]
    log.info.assert_called_once_with("files read again", files=[str(number.path)])
    log.warning.assert_not_called()


@pytest.mark.parametrize("broken", ["not a number", None])
def test_a_broken_file_leaves_the_old_value_and_one_line(number: Number, log: Mock, broken: str | None) -> None:
    files = WatchedFiles([number.path], number.load)
    if broken is None:
        number.path.unlink()
    else:
        number.path.write_text(broken)
    assert [files.current() for _ in range(3)] == [[1]] * 3
    log.warning.assert_called_once_with("new files cannot be used, the old ones stay in force", error="no number")
    number.path.write_text("3")
    assert files.current() == [3]


def test_what_was_broken_and_becomes_good_without_a_change_is_taken(number: Number) -> None:
    files = WatchedFiles([number.path], number.load)
    good = number.load
    number.path.write_text("22")

    def refuse() -> list[int]:
        raise InvalidArgument("not yet valid")

    files._load = refuse
    assert files.current() == [1]
    files._load = good
    assert files.current() == [22]
