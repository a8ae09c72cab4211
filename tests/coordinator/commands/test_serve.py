"""Flags of `coordctl serve` and `coordctl status`."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coordinator.commands import serve as serve_module
from coordinator.commands import status as status_module
from coordinator.commands.serve import serve
from coordinator.commands.status import status
from coordinator.config import SecuritySettings, ServeSettings
from protos.errors import InvalidArgument, MeshError

SECONDS = ("--round-timeout", "--recovery-timeout", "--startup-timeout", "--grace")
GOOD = {"--model": "m", "--listen": "unix:/run/c", "--workers": "unix:/run/a, unix:/run/b"}


def invoke(changes: dict[str, str], *switches: str) -> Any:
    flags = [part for pair in {**GOOD, **changes}.items() for part in pair]
    return CliRunner().invoke(serve, [*flags, *switches])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServeSettings]:
    settings: list[ServeSettings] = []
    monkeypatch.setattr(serve_module, "configure_logging", lambda *_: None)
    monkeypatch.setattr(serve_module, "_serve", lambda wanted, _: settings.append(wanted))
    monkeypatch.setattr(serve_module, "run", lambda nothing: nothing)
    return settings


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"--workers": " , "}, "no workers"),
        ({"--workers": "unix:/a,unix:/a"}, "listed 2 times"),
        ({"--workers": "a:1"}, "say --insecure"),
        ({"--listen": "0.0.0.0:80"}, "say --insecure"),
        ({"--listen": "x"}, "neither HOST:PORT"),
        ({"--shards": "3"}, "--shards 3 needs that many workers, 2 are listed"),
        ({"--discover": "dns:w:1", "--shards": "2"}, "give --workers or --discover, not both"),
        ({"--workers": "", "--discover": "dns:w:1"}, "--discover needs --shards"),
        ({"--workers": "", "--discover": "consul:w:1", "--shards": "2"}, "wanted dns:NAME:PORT or kubernetes:"),
        ({"--lease": "nowhere"}, "wanted NAMESPACE/NAME of a"),
    ],
)
def test_bad_settings_are_one_clear_error(started: list[ServeSettings], changes: dict[str, str], text: str) -> None:
    result = invoke(changes)
    assert isinstance(result.exception, InvalidArgument)
    assert text in str(result.exception)
    assert not started


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--shards", "0"),
        *((flag, value) for flag in SECONDS for value in ("nan", "inf", "-1")),
        ("--max-rows", "0"),
        ("--max-rows", "8193"),
        ("--max-running", "0"),
        ("--max-waiting", "0"),
        ("--kv-tokens", "0"),
        ("--grace", "-1"),
        ("--log-level", "loud"),
        ("--dtype", "f8"),
    ],
)
def test_flag_that_click_refuses_is_exit_code_2(started: list[ServeSettings], flag: str, value: str) -> None:
    result = invoke({flag: value})
    assert result.exit_code == 2
    assert flag in result.output
    assert not started


@pytest.mark.parametrize("missing", ["--model", "--listen"])
def test_required_flag_is_asked_for(missing: str) -> None:
    flags = [part for pair in GOOD.items() if pair[0] != missing for part in pair]
    result = CliRunner().invoke(serve, flags)
    assert result.exit_code == 2
    assert f"Missing option '{missing}'" in result.output


def test_settings_say_what_the_flags_say(started: list[ServeSettings]) -> None:
    result = invoke(
        {"--workers": "a:1,b:2", "--listen": "c:3", "--shards": "1", "--quantize": "int8", "--load-format": "random"},
        "--insecure",
    )
    assert result.exception is None, result.exception
    (settings,) = started
    assert (settings.workers, settings.listen, settings.shards, settings.insecure) == (("a:1", "b:2"), "c:3", 1, True)
    assert (settings.model.quantization, settings.model.random_weights, settings.model.wire) == ("int8", True, "bf16")


def test_doors_are_as_the_flags_say(started: list[ServeSettings]) -> None:
    flags = {"--listen": "c:1", "--tls": "t", "--caller-tls": "u", "--api-keys": "k", "--health-listen": "0.0.0.0:8"}
    result = invoke(flags, "--require-caller-certificate")
    assert result.exception is None, result.exception
    (settings,) = started
    assert settings.security == SecuritySettings(Path("t"), Path("u"), require_caller_certificate=True, api_keys=Path("k"))
    assert (settings.health_listen, settings.insecure) == ("0.0.0.0:8", False)


@pytest.mark.parametrize(
    ("changes", "startup_s"),
    [
        ({}, 60.0),
        ({"--startup-timeout": "5"}, 5.0),
        ({"--startup-timeout": "0"}, 0.0),
        ({"--workers": "", "--discover": "dns:w:1"}, None),
        ({"--workers": "", "--discover": "kubernetes:ns/w:grpc", "--lease": "ns/l", "--startup-timeout": "5"}, 5.0),
    ],
)
def test_listed_workers_are_waited_for_a_minute_and_others_for_ever(
    started: list[ServeSettings], changes: dict[str, str], startup_s: float | None
) -> None:
    result = invoke({"--shards": "2", **changes}, "--insecure")
    assert result.exception is None, result.exception
    discovery = started[0].discovery
    assert (discovery.discover, discovery.lease) == (changes.get("--discover"), changes.get("--lease"))
    assert discovery.startup_s == startup_s


@pytest.mark.parametrize(("address", "text"), [("host:1", "say --insecure"), ("nonsense", "neither HOST:PORT")])
def test_status_refuses_a_bad_address(address: str, text: str) -> None:
    result = CliRunner().invoke(status, ["--coordinator", address])
    assert isinstance(result.exception, InvalidArgument)
    assert text in str(result.exception)


def test_status_of_nobody_names_the_coordinator(tmp_path: Any) -> None:
    result = CliRunner().invoke(status_module.status, ["--coordinator", f"unix:{tmp_path}/c", "--json"])
    assert isinstance(result.exception, MeshError)
    assert f"coordinator unix:{tmp_path}/c" in str(result.exception)
    assert result.stdout == ""


def test_opentelemetrys_own_variables_ask_for_traces_and_the_flag_has_the_last_word(
    started: list[ServeSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    invoke({})
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://all:4317")
    invoke({})
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://traces:4317")
    invoke({})
    invoke({"--trace-to": "https://flag:4317"})
    assert [settings.trace_to for settings in started] == [None, "http://all:4317", "http://traces:4317", "https://flag:4317"]
