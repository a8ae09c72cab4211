"""A mesh over TCP that is closed: who gets in, who is refused with which words, and what changes without a restart."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from coordinator.api_keys import add_key
from coordinator.app import Coordinator
from coordinator.client import Credentials, GenerationClient
from coordinator.config import ModelSettings, SecuritySettings, ServeSettings
from coordinator.workers import pool
from coordinator.workers.client import WorkerClient
from protos import generation_pb2, rpc, watched
from protos.certificates import AUTHORITIES_FILE, FILES, KEY_FILE, Certificates, Identity
from protos.errors import Forbidden, InvalidArgument, MeshError, TooManyCalls, Unauthenticated, WorkerLost, from_rpc_error
from protos.generation_pb2_grpc import GenerationStub
from protos.interceptors import ErrorInterceptor
from protos.shardworker_pb2 import DescribeResponse, LoadRequest, ReleaseRequest
from protos.shardworker_pb2_grpc import ShardWorkerServicer, ShardWorkerStub, add_ShardWorkerServicer_to_server
from protos.tls import COORDINATOR_NAME, WORKER_NAME, server_credentials
from shardworker.app import RunningWorker, start_worker
from tests.authority import COORDINATOR_NAMES, TestAuthority
from tests.mesh.conftest import Mesh, MeshMaker, start_coordinator

PROMPT = [5, 6, 7, 8]
DEADLINE_S = 90


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("llama")


@pytest.fixture
def authority() -> TestAuthority:
    return TestAuthority()


@pytest.fixture
def folders(tmp_path: Path, authority: TestAuthority) -> SimpleNamespace:
    """Folders of good certificates, one for each role."""
    return SimpleNamespace(
        worker=authority.issue(tmp_path / "worker", WORKER_NAME),
        coordinator=authority.issue(tmp_path / "coordinator", *COORDINATOR_NAMES),
        caller=authority.issue(tmp_path / "caller", "caller.shardmesh"),
    )


@asynccontextmanager
async def start_workers(folder: Path, count: int) -> AsyncIterator[list[RunningWorker]]:
    async with AsyncExitStack() as stack:
        workers = []
        for _ in range(count):
            worker = await start_worker("127.0.0.1:0", device="cpu", threads=1, tls_folder=folder, health_listen="127.0.0.1:0")
            stack.push_async_callback(worker.stop, 0)
            workers.append(worker)
        yield workers


def settings(checkpoint: Path, workers: list[str], security: SecuritySettings, **changes: Any) -> ServeSettings:
    return ServeSettings(
        **{
            "model": ModelSettings(str(checkpoint), dtype="f32", wire="f32"),
            "listen": "127.0.0.1:0",
            "workers": tuple(workers),
            "security": security,
            "shards": len(workers),
            "recovery_s": 10.0,
            **changes,
        }
    )


@asynccontextmanager
async def serving(wanted: ServeSettings) -> AsyncIterator[Coordinator]:
    coordinator = await start_coordinator(wanted)
    try:
        yield coordinator
    finally:
        await coordinator.stop(0)


@asynccontextmanager
async def closed_mesh(checkpoint: Path, folders: SimpleNamespace, **changes: Any) -> AsyncIterator[Mesh]:
    """Two workers and a coordinator, all by mutual TLS, and a caller with a certificate."""
    security = SecuritySettings(tls=folders.coordinator, require_caller_certificate=True)
    async with AsyncExitStack() as stack:
        workers = await stack.enter_async_context(start_workers(folders.worker, 2))
        wanted = settings(checkpoint, [worker.address for worker in workers], security, **changes)
        coordinator = await stack.enter_async_context(serving(wanted))
        client = await stack.enter_async_context(GenerationClient(coordinator.address, Credentials(Certificates(folders.caller))))
        yield Mesh(coordinator, workers, client)


class Unchecked:
    """A folder as it is, good or bad: what another program would show."""

    def __init__(self, folder: Path) -> None:
        self.identity = Identity(*((folder / file).read_bytes() for file in FILES))

    def current(self) -> Identity:
        return self.identity


Issue = Callable[[TestAuthority, Path, tuple[str, ...]], Path]
BAD: dict[str, tuple[Issue, str]] = {
    "expired": (lambda authority, folder, names: authority.issue(folder, *names, days=(-3, -1)), "certificate has expired"),
    "foreign": (
        lambda authority, folder, names: TestAuthority("foreign").issue(folder, *names, trusts=authority),
        "unable to get local issuer certificate",
    ),
    "self-signed": (
        lambda authority, folder, names: authority.issue(folder, *names, self_signed=True),
        "self signed certificate",
    ),
    "of another role": (lambda authority, folder, _: authority.issue(folder, "x.shardmesh"), f"not for the name {WORKER_NAME}"),
    "of a coordinator": (lambda authority, folder, _: authority.issue(folder, *COORDINATOR_NAMES), "not for the name"),
}


async def test_a_closed_mesh_makes_the_tokens_of_an_open_one(mesh: MeshMaker, checkpoint: Path, folders: SimpleNamespace) -> None:
    async with mesh(checkpoint, 2) as plain, closed_mesh(checkpoint, folders) as closed:
        assert (await closed.generate(PROMPT, 20)).tokens == (await plain.generate(PROMPT, 20)).tokens


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "DESCRIBE_DEADLINE_S", 0.5)


@asynccontextmanager
async def pretender(folder: Path | None) -> AsyncIterator[str]:
    """A server that calls itself a worker; without a folder one in plaintext."""

    class Pretender(ShardWorkerServicer):
        async def Describe(self, request: Any, context: Any) -> DescribeResponse:  # noqa: N802
            raise AssertionError(f"never reached: {request} {context}")

    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    add_ShardWorkerServicer_to_server(Pretender(), server)
    if folder:
        certificates: Any = Unchecked(folder)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(certificates, require_client=True))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("kind", BAD)
async def test_a_coordinator_takes_no_worker_with_a_bad_certificate_and_says_why(
    checkpoint: Path, folders: SimpleNamespace, authority: TestAuthority, tmp_path: Path, kind: str
) -> None:
    issue, reason = BAD[kind]
    async with pretender(issue(authority, tmp_path / "bad", (WORKER_NAME,))) as address, asyncio.timeout(DEADLINE_S):
        security = SecuritySettings(tls=folders.coordinator, require_caller_certificate=True)
        with pytest.raises(WorkerLost, match=f"^worker {address}: its certificate is .*{reason}"):
            await start_coordinator(settings(checkpoint, [address], security))


@pytest.mark.usefixtures("_impatient")
async def test_a_coordinator_takes_no_worker_in_plaintext(checkpoint: Path, folders: SimpleNamespace) -> None:
    async with pretender(None) as address, asyncio.timeout(DEADLINE_S):
        security = SecuritySettings(tls=folders.coordinator, require_caller_certificate=True)
        with pytest.raises(WorkerLost, match="it does not speak TLS: was it started with --tls"):
            await start_coordinator(settings(checkpoint, [address], security))


@pytest.mark.usefixtures("_impatient")
async def test_a_good_worker_serves_beside_a_bad_one_that_is_named_in_the_log(
    checkpoint: Path, folders: SimpleNamespace, authority: TestAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = authority.issue(tmp_path / "bad", WORKER_NAME, days=(-3, -1))
    async with start_workers(folders.worker, 1) as workers, pretender(bad) as address:
        security = SecuritySettings(tls=folders.coordinator, require_caller_certificate=True)
        wanted = settings(checkpoint, [address, workers[0].address], security, shards=1)
        monkeypatch.setattr(pool, "log", log := Mock())
        async with serving(wanted):
            pass
    (refused,) = [call for call in log.warning.call_args_list if call.args == ("worker cannot be used",)]
    assert refused.kwargs["worker"] == address
    assert "certificate has expired" in refused.kwargs["error"]


async def try_everything(client: WorkerClient) -> list[MeshError]:
    """Call all that a coordinator calls; the errors."""
    errors = []

    async def load() -> None:
        async with aclosing(client.load(LoadRequest())) as responses:
            async for _ in responses:
                pass

    session = client.execute()
    stub = ShardWorkerStub(client._channel.current())
    for work in (client.describe(wait_for_ready=False), load(), session.read(), stub.Release(ReleaseRequest())):
        try:
            await work
        except MeshError as error:
            errors.append(error)
        except grpc.aio.AioRpcError as error:
            errors.append(from_rpc_error(error, "worker"))
    return errors


@pytest.mark.parametrize("names", [("caller.shardmesh",), (WORKER_NAME,), (f"{COORDINATOR_NAME}.example",), ()])
async def test_a_worker_obeys_nobody_but_a_coordinator(
    folders: SimpleNamespace, authority: TestAuthority, tmp_path: Path, names: tuple[str, ...]
) -> None:
    other: Any = Unchecked(authority.issue(tmp_path / "other", *names))
    async with (
        asyncio.timeout(DEADLINE_S),
        start_workers(folders.worker, 1) as (worker,),
        WorkerClient(worker.address, other) as client,
    ):
        errors = await try_everything(client)
        health = health_pb2_grpc.HealthStub(client._channel.current())
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
    assert [type(error) for error in errors] == [Forbidden] * 4
    assert "wanted a certificate for the DNS name coordinator.shardmesh" in str(errors[0])
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("kind", ["expired", "foreign", "self-signed"])
async def test_a_worker_hears_nothing_of_a_client_with_a_bad_certificate(
    folders: SimpleNamespace, authority: TestAuthority, tmp_path: Path, kind: str
) -> None:
    bad: Any = Unchecked(BAD[kind][0](authority, tmp_path / "bad", COORDINATOR_NAMES))
    async with start_workers(folders.worker, 1) as (worker,), asyncio.timeout(DEADLINE_S):
        async with WorkerClient(worker.address, bad) as client:
            with pytest.raises(WorkerLost, match="it ends the connection: it refuses our certificate"):
                await client.describe(wait_for_ready=False)
        async with WorkerClient(worker.address) as client:
            with pytest.raises(WorkerLost, match="it ends the connection: it wants TLS"):
                await client.describe(wait_for_ready=False)


async def test_a_program_does_not_start_with_anothers_certificate(checkpoint: Path, folders: SimpleNamespace) -> None:
    with pytest.raises(InvalidArgument, match=f"must be for the DNS name {WORKER_NAME}, found {COORDINATOR_NAME}"):
        await start_worker("127.0.0.1:0", device="cpu", tls_folder=folders.coordinator)
    security = SecuritySettings(tls=folders.worker, require_caller_certificate=True)
    with pytest.raises(InvalidArgument, match=f"must be for the DNS name {COORDINATOR_NAME}, found {WORKER_NAME}"):
        await start_coordinator(settings(checkpoint, ["unix:/none"], security))


async def test_callers_are_refused_without_a_certificate_or_of_a_foreign_one(
    checkpoint: Path, folders: SimpleNamespace, authority: TestAuthority, tmp_path: Path
) -> None:
    (tmp_path / "trusting").mkdir()
    shutil.copy(folders.caller / AUTHORITIES_FILE, tmp_path / "trusting")
    trusting = Certificates(tmp_path / "trusting", needs=(AUTHORITIES_FILE,))
    foreign = Certificates(TestAuthority("foreign").issue(tmp_path / "foreign", "caller.shardmesh", trusts=authority))
    deceived = Certificates(authority.issue(tmp_path / "deceived", "caller.shardmesh", trusts=TestAuthority("foreign")))
    async with closed_mesh(checkpoint, folders) as running, asyncio.timeout(DEADLINE_S):
        for certificates, text in (
            (trusting, "it refuses our certificate"),
            (foreign, "it refuses our certificate"),
            (deceived, "its certificate is refused: unable to get local issuer certificate"),
            (None, "it wants TLS"),
        ):
            async with GenerationClient(running.coordinator.address, Credentials(certificates)) as client:
                with pytest.raises(WorkerLost, match=text):
                    await client.mesh()


async def test_callers_may_see_another_certificate_and_need_none(
    checkpoint: Path, folders: SimpleNamespace, tmp_path: Path
) -> None:
    public = TestAuthority("public")
    shown = public.issue(tmp_path / "public", "127.0.0.1")
    (shown / AUTHORITIES_FILE).unlink()
    (tmp_path / "trusting").mkdir()
    (tmp_path / "trusting" / AUTHORITIES_FILE).write_bytes(public.pem)
    key = add_key(tmp_path / "keys", "alice", None)
    trusting = Certificates(tmp_path / "trusting", needs=(AUTHORITIES_FILE,))
    security = SecuritySettings(tls=folders.coordinator, caller_tls=shown, api_keys=tmp_path / "keys")
    async with (
        start_workers(folders.worker, 1) as (worker,),
        serving(settings(checkpoint, [worker.address], security)) as running,
    ):
        async with GenerationClient(running.address, Credentials(trusting, key)) as client:
            assert (await client.mesh()).serving
        _, _, port = running.address.rpartition(":")
        async with GenerationClient(f"localhost:{port}", Credentials(trusting, key)) as client:
            with pytest.raises(WorkerLost, match="its certificate is not for the name localhost"):
                await client.mesh()


async def test_certificates_change_without_a_restart_and_streams_go_on(
    checkpoint: Path, folders: SimpleNamespace, authority: TestAuthority
) -> None:
    """From one authority to another, as people do it: first trust both, then sign anew, then trust the new one alone."""
    new = TestAuthority("new authority")
    roles = {"worker": (WORKER_NAME,), "coordinator": COORDINATOR_NAMES, "caller": ("caller.shardmesh",)}
    request = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=PROMPT), max_tokens=300, ignore_eos=True)
    async with closed_mesh(checkpoint, folders) as running, asyncio.timeout(DEADLINE_S):
        undisturbed = (await running.generate(PROMPT, 300)).tokens
        streamed: list[int] = []
        async with aclosing(running.client.generate(request)) as responses:
            async for response in responses:
                streamed += response.delta.token_ids
                if len(streamed) == 5:
                    for role in roles:
                        (getattr(folders, role) / AUTHORITIES_FILE).write_bytes(authority.pem + new.pem)
                if len(streamed) == 20:
                    for role, names in roles.items():
                        new.issue(getattr(folders, role), *names)
                    # New connections: to the workers for this, and this caller's own.
                    async with GenerationClient(running.coordinator.address, Credentials(Certificates(folders.caller))) as client:
                        status = await client.mesh()
                        assert [worker.reachable for worker in status.workers] == [True, True]
                        assert status.epoch == 1
        assert streamed == undisturbed
        # What the old authority signed gets in no more.
        old: Any = Unchecked(authority.issue(folders.caller, *COORDINATOR_NAMES, trusts=new))
        for worker in running.workers:
            async with WorkerClient(worker.address, old) as client:
                with pytest.raises(WorkerLost, match="it refuses our certificate"):
                    await client.describe(wait_for_ready=False)


async def test_broken_new_certificates_leave_the_old_ones_in_force_with_one_line(
    checkpoint: Path, folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with closed_mesh(checkpoint, folders) as running, asyncio.timeout(DEADLINE_S):
        (folders.worker / KEY_FILE).write_text("half")
        monkeypatch.setattr(watched, "log", log := Mock())
        for _ in range(3):
            async with WorkerClient(running.workers[0].address, Certificates(folders.coordinator)) as client:
                await client.describe(wait_for_ready=False)
    # Of one worker that was connected to; the other met nobody new.
    log.warning.assert_called_once()
    assert "tls.key is not a private key" in log.warning.call_args.kwargs["error"]


@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_keys_are_asked_for_on_every_listener(
    checkpoint: Path, folders: SimpleNamespace, tmp_path: Path, transport: str
) -> None:
    key = add_key(tmp_path / "keys", "alice", 1)
    is_unix = transport == "unix"
    security = SecuritySettings(tls=folders.coordinator, api_keys=tmp_path / "keys")
    changes = {"listen": f"unix:{tmp_path}/c"} if is_unix else {}
    certificates = None if is_unix else Certificates(folders.caller)
    async with start_workers(folders.worker, 1) as (worker,):
        wanted = settings(checkpoint, [worker.address], security, health_listen="127.0.0.1:0", **changes)
        async with serving(wanted) as coordinator, asyncio.timeout(DEADLINE_S):
            for wrong in (None, "shardmesh_wrong"):
                async with GenerationClient(coordinator.address, Credentials(certificates, wrong)) as client:
                    for call in (client.mesh(), client.model(), anext(client.generate(generation_pb2.GenerateRequest()))):
                        with pytest.raises(Unauthenticated):
                            await call
            async with GenerationClient(coordinator.address, Credentials(certificates, key)) as client:
                assert (await client.mesh()).serving
                await check_limit(client)
            assert coordinator._probes
            async with grpc.aio.insecure_channel(coordinator._probes.address) as channel:
                probe = health_pb2.HealthCheckRequest(service="shardmesh.v1.Generation")
                answer = await health_pb2_grpc.HealthStub(channel).Check(probe, timeout=DEADLINE_S)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await GenerationStub(channel).GetModel(generation_pb2.GetModelRequest(), timeout=DEADLINE_S)
                assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def check_limit(client: GenerationClient) -> None:
    """Of a key that allows one call: a second one is refused and told when to try again, a third one after the first works."""
    request = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=PROMPT), max_tokens=400, ignore_eos=True)
    async with aclosing(client.generate(request)) as first:
        await anext(first)
        with pytest.raises(TooManyCalls, match="alice has 1 calls under way"):
            await anext(client.generate(request))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client._stub.Generate(request, metadata=client._metadata).read()
        status = rpc_status.from_call(raised.value)
        retry = error_details_pb2.RetryInfo()
        assert any(detail.Unpack(retry) for detail in status.details)
        assert retry.retry_delay.ToMilliseconds() > 0
        assert (await client.mesh()).load.running == 1
    request.max_tokens = 2
    while True:
        # The server hears of the first one's end a little later.
        try:
            assert [response async for response in client.generate(request)][-1].WhichOneof("event") == "finished"
        except TooManyCalls:
            continue
        break
