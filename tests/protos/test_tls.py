"""Connections between two ends of a mesh: which are made, which are refused, and what the client can say about it."""

import asyncio
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from protos import rpc, tls
from protos.certificates import FILES, Certificates, Identity
from protos.rpc import channel_options, server_options
from tests.authority import COORDINATOR_NAMES, PrivateKey, TestAuthority

LIMITS = {"max_send_bytes": 1000, "max_receive_bytes": 1000}
DEADLINE_S = 20
METHOD = "/test.Test/Unary"


class Unchecked:
    """A folder as it is, good or bad: what somebody who wrote another program would use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = self.read()

    def read(self) -> Identity:
        self.identity = Identity(
            *((self.folder / file).read_bytes() if (self.folder / file).exists() else None for file in FILES)
        )
        return self.identity

    def current(self) -> Identity:
        return self.identity


async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    del request
    return b" ".join(context.auth_context().get("peer_dns", ()))


@asynccontextmanager
async def serving(certificates: Any, *, require_client: bool = True) -> AsyncIterator[int]:
    server = grpc.aio.server(options=server_options(**LIMITS))
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", {"Unary": handler}),))
    credentials = tls.server_credentials(certificates, require_client=require_client) if certificates else None
    port = server.add_secure_port("127.0.0.1:0", credentials) if credentials else server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def call(port: int, identity: Identity | None, name: str | None = tls.WORKER_NAME) -> bytes:
    options = [*channel_options(**LIMITS), *([("grpc.ssl_target_name_override", name)] if name else [])]
    address = f"127.0.0.1:{port}"
    if identity:
        channel = grpc.aio.secure_channel(address, tls.channel_credentials(identity), options=options)
    else:
        channel = grpc.aio.insecure_channel(address, options=options)
    async with channel:
        response: bytes = await channel.unary_unary(METHOD)(b"", timeout=DEADLINE_S)
        return response


async def refusal(port: int, identity: Identity | None, name: str | None = tls.WORKER_NAME) -> str | None:
    """What the client can say of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(port, identity, name)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    return tls.explain(raised.value.details() or "", name if identity else None)


@pytest.fixture(scope="module")
def authority() -> TestAuthority:
    return TestAuthority()


@pytest.fixture(scope="module")
def foreign() -> TestAuthority:
    return TestAuthority("foreign authority")


@pytest.fixture
def worker(tmp_path: Path, authority: TestAuthority) -> Path:
    return authority.issue(tmp_path / "worker", tls.WORKER_NAME)


@pytest.fixture
def coordinator(tmp_path: Path, authority: TestAuthority) -> Path:
    return authority.issue(tmp_path / "coordinator", *COORDINATOR_NAMES)


Issue = Callable[[TestAuthority, TestAuthority, Path, tuple[str, ...]], Path]

BAD: dict[str, Issue] = {
    "expired": lambda authority, _, folder, names: authority.issue(folder, *names, days=(-3, -1)),
    "not yet valid": lambda authority, _, folder, names: authority.issue(folder, *names, days=(1, 3)),
    "foreign": lambda authority, foreign, folder, names: foreign.issue(folder, *names, trusts=authority),
    "self-signed": lambda authority, _, folder, names: authority.issue(folder, *names, self_signed=True),
}
REASONS = {
    "expired": "certificate has expired",
    "not yet valid": "certificate is not yet valid",
    "foreign": "unable to get local issuer certificate",
    "self-signed": "self signed certificate",
}


@pytest.mark.parametrize(
    "key",
    [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())],
    ids=["RSA", "P-384"],
)
async def test_keys_of_other_authorities_do_too(authority: TestAuthority, tmp_path: Path, key: PrivateKey) -> None:
    server = Certificates(authority.issue(tmp_path / "server", tls.WORKER_NAME, key=key))
    client = Certificates(authority.issue(tmp_path / "client", *COORDINATOR_NAMES, key=key))
    async with serving(server) as port:
        assert await call(port, client.current())


async def test_both_ends_know_each_other_by_role(worker: Path, coordinator: Path) -> None:
    async with serving(Unchecked(worker)) as port:
        assert await call(port, Unchecked(coordinator).identity) == b"coordinator.shardmesh localhost"


@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_servers_certificate_is_refused_with_the_reason(
    authority: TestAuthority, foreign: TestAuthority, tmp_path: Path, coordinator: Path, kind: str
) -> None:
    bad = BAD[kind](authority, foreign, tmp_path / "bad", (tls.WORKER_NAME,))
    async with serving(Unchecked(bad)) as port:
        text = await refusal(port, Unchecked(coordinator).identity)
    assert text == f"its certificate is refused: {REASONS[kind]}; it must be signed by a CA of ca.crt, and be valid today"


@pytest.mark.parametrize("names", [("caller.shardmesh",), COORDINATOR_NAMES, ("shardworker.shardmesh.example",), ()])
async def test_a_server_of_another_role_is_refused(
    authority: TestAuthority, tmp_path: Path, coordinator: Path, names: tuple[str, ...]
) -> None:
    async with serving(Unchecked(authority.issue(tmp_path / "other", *names))) as port:
        text = await refusal(port, Unchecked(coordinator).identity)
    assert text == "its certificate is not for the name shardworker.shardmesh"


@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_clients_certificate_is_refused(
    authority: TestAuthority, foreign: TestAuthority, tmp_path: Path, worker: Path, kind: str
) -> None:
    bad = BAD[kind](authority, foreign, tmp_path / "bad", COORDINATOR_NAMES)
    async with serving(Unchecked(worker)) as port:
        text = await refusal(port, Unchecked(bad).identity)
    assert text == "it ends the connection: it refuses our certificate (expired, of another CA, or none)"


async def test_a_client_without_a_certificate_is_refused_where_one_is_demanded(worker: Path, authority: TestAuthority) -> None:
    nameless = Identity(None, None, authority.pem)
    async with serving(Unchecked(worker)) as port:
        assert "it refuses our certificate" in str(await refusal(port, nameless))
    async with serving(Unchecked(worker), require_client=False) as port:
        assert await call(port, nameless) == b""


async def test_plaintext_and_tls_do_not_mix(worker: Path, coordinator: Path) -> None:
    async with serving(Unchecked(worker)) as port:
        assert "it wants TLS" in str(await refusal(port, None))
    async with serving(None) as port:
        assert await refusal(port, Unchecked(coordinator).identity) == "it does not speak TLS: was it started with --tls?"


async def test_a_host_is_verified_by_name_and_by_address(coordinator: Path, worker: Path) -> None:
    trusting = Unchecked(coordinator).identity
    async with serving(Unchecked(coordinator)) as port:
        assert await call(port, trusting, None)
        assert await call(port, trusting, "localhost")
        assert "not for the name elsewhere" in str(await refusal(port, trusting, "elsewhere"))
    async with serving(Unchecked(worker)) as port:
        assert await refusal(port, trusting, None)


async def test_new_certificates_meet_new_connections_and_running_ones_go_on(
    worker: Path, coordinator: Path, foreign: TestAuthority
) -> None:
    served, old = Unchecked(worker), Unchecked(coordinator).identity
    async with serving(served) as port:
        options = [*channel_options(**LIMITS), ("grpc.ssl_target_name_override", tls.WORKER_NAME)]
        credentials = tls.channel_credentials(old)
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
            unary = channel.unary_unary(METHOD)
            await unary(b"", timeout=DEADLINE_S)
            foreign.issue(worker, tls.WORKER_NAME)
            served.read()
            # On the connection that there is.
            await unary(b"", timeout=DEADLINE_S)
        assert "its certificate is refused" in str(await refusal(port, old))
        foreign.issue(coordinator, *COORDINATOR_NAMES)
        assert await call(port, Unchecked(coordinator).identity)


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01"], ids=["nothing", "half a greeting"])
async def test_a_connection_that_never_speaks_is_closed(worker: Path, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setattr(rpc, "HANDSHAKE_MS", 200)
    async with serving(Unchecked(worker)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(said)
        assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
        writer.close()


def test_other_failures_are_not_blamed_on_tls() -> None:
    for details in ("Deadline Exceeded", "Socket closed", "failed to connect to all addresses; last error: Connection refused"):
        assert tls.explain(details, tls.WORKER_NAME) is None


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is missing")
async def test_openssl_gets_tls_1_2_and_1_3_and_nothing_older(worker: Path, coordinator: Path) -> None:
    async def handshake(port: int, version: str) -> str:
        command = (
            *("openssl", "s_client", version, "-connect", f"127.0.0.1:{port}", "-CAfile", coordinator / "ca.crt"),
            *("-cert", coordinator / "tls.crt", "-key", coordinator / "tls.key", "-cipher", "ALL:@SECLEVEL=0"),
        )
        process = await asyncio.create_subprocess_exec(
            *map(str, command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        return output.decode(errors="replace")

    async with serving(Unchecked(worker)) as port:
        for version, name in (("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")):
            assert f"New, {name}, Cipher is " in await handshake(port, version)
        for version in ("-tls1", "-tls1_1"):
            refused = await handshake(port, version)
            assert "Cipher is (NONE)" in refused
            # By the server, to which it was said, and not because this openssl does not want to.
            assert re.search(r"has read \d+ bytes and written [1-9]", refused)
