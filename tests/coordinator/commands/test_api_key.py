"""`coordctl api-key`: the key on standard output, once, and its hash in the file."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coordinator.api_keys import read_keys
from coordinator.commands.api_key import api_key
from protos.errors import InvalidArgument


def invoke(path: Path, *arguments: str) -> Any:
    return CliRunner().invoke(api_key, [*arguments, "--file", str(path)])


def test_the_key_is_all_that_is_printed(tmp_path: Path) -> None:
    printed = [invoke(tmp_path / "k", name, *more).stdout for name, more in (("a", ()), ("b", ("--max-calls", "3")))]
    keys = read_keys(tmp_path / "k")
    assert [(key.name, key.max_calls) for key in keys] == [("a", None), ("b", 3)]
    assert [hashlib.sha256(line.rstrip("\n").encode()).digest() for line in printed] == [key.digest for key in keys]


def test_an_operator_is_one_by_a_flag(tmp_path: Path) -> None:
    invoke(tmp_path / "k", "olga", "--operator", "--max-calls", "3")
    invoke(tmp_path / "k", "alice")
    assert [(key.name, key.max_calls, key.is_operator) for key in read_keys(tmp_path / "k")] == [
        ("olga", 3, True),
        ("alice", None, False),
    ]


def test_a_refusal_prints_no_key(tmp_path: Path) -> None:
    invoke(tmp_path / "k", "a")
    result = invoke(tmp_path / "k", "a")
    assert isinstance(result.exception, InvalidArgument)
    assert result.stdout == ""


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1000000"])
def test_a_limit_is_a_number_that_the_file_can_hold(tmp_path: Path, limit: str) -> None:
    assert invoke(tmp_path / "k", "a", "--max-calls", limit).exit_code == 2
    assert not (tmp_path / "k").exists()
