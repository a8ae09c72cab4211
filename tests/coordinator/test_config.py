"""Settings that cannot work are refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from coordinator.config import DiscoverySettings, ModelSettings, SecuritySettings, ServeSettings
from protos.errors import InvalidArgument

DIR = Path("/etc/tls")


def settings(**changes: Any) -> ServeSettings:
    return ServeSettings(
        **{"model": ModelSettings("m"), "listen": "unix:/run/c", "workers": ("unix:/run/a", "unix:/run/b"), **changes}
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"workers": ()}, "no workers: --workers needs at least one address"),
        ({"workers": ("unix:/a", "unix:/b", "unix:/a")}, "worker unix:/a is listed 2 times"),
        ({"workers": (), "discovery": DiscoverySettings("dns:w:1"), "shards": 1}, "are reached by TCP: give --tls DIR"),
        ({"discovery": DiscoverySettings("dns:w:1"), "shards": 1, "insecure": True}, "--workers or --discover, not both"),
        ({"workers": (), "discovery": DiscoverySettings("dns:w:1"), "insecure": True}, "--discover needs --shards"),
        ({"workers": (), "discovery": DiscoverySettings("dns:w"), "shards": 1}, "neither HOST:PORT"),
        ({"discovery": DiscoverySettings(lease="x")}, "--lease x: wanted NAMESPACE/NAME"),
        ({"workers": ("nowhere",)}, "'nowhere' is neither HOST:PORT nor unix:PATH"),
        ({"workers": ("host:1",)}, "TCP without TLS: say --insecure"),
        ({"listen": "0.0.0.0:1"}, "TCP without TLS: say --insecure"),
        ({"listen": "host:99999", "insecure": True}, "neither HOST:PORT"),
        ({"listen": "unix:" + "x" * 108}, "needs a path of 1 to 107 bytes"),
        ({"listen": "0.0.0.0:1", "security": SecuritySettings(tls=DIR)}, "would let in everybody: give --api-keys FILE or"),
        ({"listen": "0.0.0.0:1", "security": SecuritySettings(api_keys=DIR)}, "TCP without TLS: say --insecure"),
        (
            {"listen": "h:1", "workers": ("h:2",), "security": SecuritySettings(caller_tls=DIR, api_keys=DIR)},
            "address h:2 is TCP without TLS: say --insecure",
        ),
        ({"security": SecuritySettings(caller_tls=DIR)}, "is a socket file, which has no certificates"),
        ({"security": SecuritySettings(tls=DIR, require_caller_certificate=True)}, "is a socket file, which has no certificates"),
        (
            {"listen": "host:1", "insecure": True, "security": SecuritySettings(require_caller_certificate=True)},
            "--require-caller-certificate needs TLS: give --tls DIR",
        ),
        ({"health_listen": "nowhere"}, "'nowhere' is neither HOST:PORT nor unix:PATH"),
        ({"metrics_listen": "nowhere"}, "'nowhere' is neither HOST:PORT nor unix:PATH"),
        ({"metrics_listen": "unix:/run/m"}, "--metrics-listen must be HOST:PORT"),
        *[
            ({"trace_to": url}, "takes http://HOST:PORT, or https://HOST:PORT for TLS")
            for url in ("collector:4317", "http://collector", "http://c:99999", "grpc://c:1", "http://c:1/v1/traces", "http://:1")
        ],
        ({"shards": 0}, "--shards 0 needs that many workers, 2 are listed"),
        ({"shards": 3}, "--shards 3 needs that many workers, 2 are listed"),
        *[({name: 0}, f"{name} must be >= 1, found 0") for name in ("max_rows", "max_running", "max_waiting", "kv_tokens")],
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        settings(**changes)


def test_good_settings_are_taken() -> None:
    settings(shards=2)
    settings(listen="127.0.0.1:0", workers=("a:1", "[::1]:2"), insecure=True)
    settings(health_listen="0.0.0.0:1", security=SecuritySettings(api_keys=DIR))
    settings(workers=(), discovery=DiscoverySettings("dns:w:1", "a/b"), shards=64, security=SecuritySettings(tls=DIR))


@pytest.mark.parametrize(
    "security",
    [
        SecuritySettings(tls=DIR, api_keys=DIR),
        SecuritySettings(tls=DIR, require_caller_certificate=True),
        SecuritySettings(tls=DIR, caller_tls=DIR, require_caller_certificate=True, api_keys=DIR),
    ],
)
def test_tcp_needs_no_insecure_where_both_sides_are_closed(security: SecuritySettings) -> None:
    settings(listen="0.0.0.0:1", workers=("a:1", "unix:/b"), security=security)


def test_callers_without_a_key_or_certificate_must_be_asked_for() -> None:
    settings(listen="0.0.0.0:1", insecure=True, security=SecuritySettings(tls=DIR))
