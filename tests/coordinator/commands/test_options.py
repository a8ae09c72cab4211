"""What a caller shows: where the key comes from, and that it is never on the command line nor in an error."""

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from coordinator.client import Credentials
from coordinator.commands.generate import generate
from coordinator.commands.options import API_KEY_VARIABLE, caller_credentials, caller_options
from protos.errors import InvalidArgument
from tests.authority import TestAuthority


def credentials(*arguments: str, key: str | None = None) -> Credentials:
    found: list[Credentials] = []

    @click.command()
    @caller_options
    def command(**flags: Any) -> None:
        found.append(caller_credentials(flags))

    CliRunner(env={API_KEY_VARIABLE: key}).invoke(command, list(arguments), catch_exceptions=False)
    return found[0]


def test_without_flags_and_environment_there_is_nothing() -> None:
    assert credentials() == Credentials()


def test_a_key_comes_from_a_file_or_else_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-file\n")
    assert credentials(key="from-environment").api_key == "from-environment"
    assert credentials("--api-key-file", str(tmp_path / "key"), key="from-environment").api_key == "from-file"


@pytest.mark.parametrize("text", ["", "\n", "secret secret", "secret\nsecret", "sécret", "secret\x00"])
def test_what_is_no_key_is_refused_without_showing_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    with pytest.raises(InvalidArgument, match="must hold one API key and nothing else") as raised:
        credentials("--api-key-file", str(tmp_path / "key"))
    assert "ecret" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=f"--api-key-file {tmp_path}/key cannot be read: No such file"):
        credentials("--api-key-file", str(tmp_path / "key"))


def test_a_caller_needs_the_authority_alone(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(TestAuthority().pem)
    shown = credentials("--tls", str(tmp_path)).certificates
    assert shown is not None
    assert shown.current().chain is None
    with pytest.raises(InvalidArgument, match=r"ca.crt is missing"):
        credentials("--tls", str(tmp_path / "none"))


def test_a_key_is_not_in_what_is_printed_of_its_object() -> None:
    assert "secret" not in repr(Credentials(api_key="secret"))


@pytest.mark.parametrize("flag", ["--tls", "--api-key-file"])
def test_flags_of_callers_need_a_coordinator(flag: str) -> None:
    result = CliRunner().invoke(generate, ["--model", "m", "--prompt", "x", flag, "/none"])
    assert isinstance(result.exception, InvalidArgument)
    assert str(result.exception) == f"{flag} is for calling a coordinator: give --coordinator too"
