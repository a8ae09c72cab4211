"""How the API server is reached from within a pod, and lines that come in pieces."""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace

import pytest
from kubernetes.aio.config import incluster_config

from coordinator.discovery import api as api_module
from coordinator.discovery.api import ApiError, KubernetesApi, whole_lines
from protos.errors import InvalidArgument
from tests.authority import TestAuthority
from tests.coordinator.discovery.api_server import Answer, ApiServer, Asked, api_server, refusal, write_kubeconfig


async def pieces(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([], []),
        ([b"a\nb\n"], [b"a", b"b"]),
        ([b"a", b"b", b"\n", b"c\nd", b"\n"], [b"ab", b"c", b"d"]),
        ([b"\n\r\na\r\n \n"], [b"a\r"]),
        ([b"a\nbroken off"], [b"a"]),
    ],
)
async def test_only_whole_lines_are_given(chunks: list[bytes], lines: list[bytes]) -> None:
    assert [line async for line in whole_lines(pieces(*chunks))] == lines


async def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_module, "_MAX_LINE_BYTES", 10)
    with pytest.raises(ValueError, match="a line of more than 10 bytes"):
        [line async for line in whole_lines(pieces(b"x" * 6, b"x" * 6))]


class Pod:
    """What a pod is given, in a temporary folder."""

    def __init__(self, folder: Path, authority: TestAuthority, monkeypatch: pytest.MonkeyPatch) -> None:
        self.token = folder / "token"
        self.token.write_text("first")
        (folder / "namespace").write_text("mesh\n")
        (folder / "ca.crt").write_bytes(authority.pem)
        monkeypatch.delenv("KUBECONFIG", raising=False)
        monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(self.token))
        monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(folder / "ca.crt"))
        monkeypatch.setattr(api_module, "_NAMESPACE_FILE", folder / "namespace")
        self._monkeypatch = monkeypatch

    def points_to(self, server: ApiServer) -> None:
        host, port = server.address.removeprefix("http://").split(":")
        self._monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        self._monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pod:
    return Pod(tmp_path, TestAuthority(), monkeypatch)


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[ApiServer, Pod]]:
    authority = TestAuthority()
    folder = authority.issue(tmp_path / "server", "127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    pod = Pod(tmp_path, authority, monkeypatch)
    async with asyncio.timeout(20), api_server(lambda asked: Answer(body={"path": asked.path}), context) as server:
        pod.points_to(server)
        yield server, pod


def shown(asked: Asked) -> str:
    return asked.headers["authorization"].partition(" ")[2]


async def test_a_pod_shows_its_token_and_another_one_when_it_was_replaced(
    server: tuple[ApiServer, Pod], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, pod = server
    async with aclosing(await KubernetesApi.connect()) as api:
        assert api.namespace == "mesh"
        assert await api.request("GET", "/x") == {"path": "/x"}
        pod.token.write_text("second")
        await api.request("GET", "/x")
        # The client looks again after a minute; who connects anew does at once.
        later = dt.datetime.now() + dt.timedelta(minutes=2)  # noqa: DTZ005  # as the client reckons
        clock = SimpleNamespace(datetime=SimpleNamespace(now=lambda: later), timedelta=dt.timedelta)
        monkeypatch.setattr(incluster_config, "datetime", clock)
        await api.request("GET", "/x")
    monkeypatch.setattr(incluster_config, "datetime", dt)
    pod.token.write_text("third")
    async with aclosing(await KubernetesApi.connect()) as api:
        await api.request("GET", "/x")
    assert [shown(asked) for asked in running.asked] == ["first", "first", "second", "third"]


async def test_a_server_of_another_authority_is_shown_nothing(server: tuple[ApiServer, Pod], tmp_path: Path) -> None:
    running, _ = server
    (tmp_path / "ca.crt").write_bytes(TestAuthority("another").pem)
    async with aclosing(await KubernetesApi.connect()) as api:
        with pytest.raises(ApiError, match="certificate verify failed"):
            await api.request("GET", "/x")
    assert running.asked == []


async def test_a_pod_without_a_token_says_so(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    pod.token.unlink()
    with pytest.raises(InvalidArgument, match=r"Service token file does not exist.* \(a pod needs its service account's token"):
        await KubernetesApi.connect()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (Answer(403, refusal(403, "Forbidden", "leases is forbidden")), "PUT /x: leases is forbidden"),
        (Answer(500, ["no status"]), r'PUT /x: \["no status"\]'),
        (Answer(502, ""), 'PUT /x: ""'),
    ],
)
async def test_a_refusal_is_told_in_the_servers_words(
    answer: Answer, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncio.timeout(20), api_server(lambda _: answer) as server:
        write_kubeconfig(tmp_path / "config", server.address)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        async with aclosing(await KubernetesApi.connect()) as api:
            with pytest.raises(ApiError, match=text) as raised:
                await api.request("PUT", "/x", body={"a": 1})
    assert raised.value.status == answer.status
    assert server.asked[0].body == {"a": 1}
