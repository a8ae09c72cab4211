"""Settings that cannot work are refused before anything starts."""

from typing import Any

import pytest

from coordinator.config import ModelSettings, ServeSettings
from protos.errors import InvalidArgument


def settings(**changes: Any) -> ServeSettings:
    return ServeSettings(
        **{"model": ModelSettings("m"), "listen": "unix:/run/c", "workers": ("unix:/run/a", "unix:/run/b"), **changes}
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"workers": ()}, "no workers: --workers needs at least one address"),
        ({"workers": ("unix:/a", "unix:/b", "unix:/a")}, "worker unix:/a is listed 2 times"),
        ({"workers": ("nowhere",)}, "'nowhere' is neither HOST:PORT nor unix:PATH"),
        ({"workers": ("host:1",)}, "TCP without TLS: say --insecure"),
        ({"listen": "0.0.0.0:1"}, "TCP without TLS: say --insecure"),
        ({"listen": "host:99999", "insecure": True}, "neither HOST:PORT"),
        ({"listen": "unix:" + "x" * 108}, "needs a path of 1 to 107 bytes"),
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
