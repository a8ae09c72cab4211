"""The private mesh's processes, with a stub in the place of the worker program."""

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator import embedded
from coordinator.embedded import MAX_SHARDS, EmbeddedWorkers
from protos.errors import InvalidArgument, WorkerLost

STUB = """#!{python} -S
import os, sys, time
arguments = sys.argv[1:]
address = arguments[arguments.index("--listen") + 1]
folder = {folder!r}
number = address.rpartition("-")[2][0]
open(os.path.join(folder, "pid-" + number), "w").write(str(os.getpid()))
open(os.path.join(folder, "arguments-" + number), "w").write(" ".join(arguments))
behaviour = {behaviours!r}[int(number)]
if behaviour == "fails":
    sys.exit("first\\nno such device")
if behaviour == "babbles":
    print("hello", flush=True)
    time.sleep(60)
if behaviour == "silent":
    time.sleep(60)
open(address[len("unix:"):], "w")
print("listening on " + address, flush=True)
if behaviour == "dies":
    sys.exit(0)
sys.stdin.read()
if behaviour == "stubborn":
    time.sleep(60)
"""

Stub = Callable[..., None]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))

    def install(*behaviours: str) -> None:
        program = tmp_path / "stub"
        program.write_text(STUB.format(python=sys.executable, folder=str(tmp_path), behaviours=behaviours))
        program.chmod(0o700)
        monkeypatch.setattr(embedded.sys, "executable", str(program))

    return install


def alive(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("pid-*") if Path("/proc", path.read_text()).exists()]


def left_behind(folder: Path) -> list[Path]:
    return list((folder / "t").iterdir())


async def test_workers_run_within_the_context_and_leave_nothing(stub: Stub, tmp_path: Path) -> None:
    stub("good", "good")
    async with EmbeddedWorkers(2, "cpu", 3) as workers:
        await workers.wait_listening()
        assert len(set(workers.addresses)) == 2
        assert all(Path(address.removeprefix("unix:")).exists() for address in workers.addresses)
        folder = Path(workers.coordinator_address.removeprefix("unix:")).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(alive(tmp_path)) == 2
        assert (tmp_path / "arguments-1").read_text() == (
            f"-m shardworker serve --listen {workers.addresses[1]} "
            f"--device cpu --threads 3 --log-level error --embedded-in {folder}"
        )
    assert (alive(tmp_path), left_behind(tmp_path)) == ([], [])


async def test_error_within_the_context_leaves_nothing(stub: Stub, tmp_path: Path) -> None:
    stub("good", "dies")
    with pytest.raises(RuntimeError, match="of the body"):
        async with EmbeddedWorkers(2, "cpu", None):
            raise RuntimeError("of the body")
    assert (alive(tmp_path), left_behind(tmp_path)) == ([], [])


@pytest.mark.parametrize("behaviours", [("good", "fails", "good"), ("fails", "fails", "fails")])
async def test_worker_that_fails_to_start_ends_all(stub: Stub, tmp_path: Path, behaviours: tuple[str, ...]) -> None:
    stub(*behaviours)
    with pytest.raises(WorkerLost, match="ended with exit code 1 before it listened: no such device"):
        async with EmbeddedWorkers(3, "cpu", 1) as workers:
            await workers.wait_listening()
    assert (alive(tmp_path), left_behind(tmp_path)) == ([], [])


@pytest.mark.parametrize("behaviour", ["silent", "babbles"])
async def test_worker_that_never_listens_is_killed(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    stub("good", behaviour)
    monkeypatch.setattr(embedded, "START_DEADLINE_S", 1.0)
    monkeypatch.setattr(embedded, "STOP_DEADLINE_S", 0.1)
    with pytest.raises(WorkerLost, match="did not start within 1 s"):
        async with EmbeddedWorkers(2, "cpu", 1) as workers:
            await workers.wait_listening()
    assert (alive(tmp_path), left_behind(tmp_path)) == ([], [])


async def test_worker_that_does_not_end_is_killed(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("stubborn")
    monkeypatch.setattr(embedded, "STOP_DEADLINE_S", 0.1)
    async with EmbeddedWorkers(1, "cpu", 1) as workers:
        await workers.wait_listening()
        assert len(alive(tmp_path)) == 1
    assert (alive(tmp_path), left_behind(tmp_path)) == ([], [])


async def test_cancellation_while_starting_leaves_nothing(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("silent", "silent")
    monkeypatch.setattr(embedded, "STOP_DEADLINE_S", 0.1)
    workers = EmbeddedWorkers(2, "cpu", 1)
    starting = asyncio.create_task(workers.__aenter__())
    while not workers._processes:  # noqa: ASYNC110  # nothing tells when the first one is there
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert all(process.returncode is not None for process in workers._processes)
    assert (alive(tmp_path), left_behind(tmp_path)) == ([], [])


async def test_cancellation_while_stopping_still_leaves_nothing(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub("stubborn", "good")
    monkeypatch.setattr(embedded, "STOP_DEADLINE_S", 0.2)
    workers = EmbeddedWorkers(2, "cpu", 1)
    await workers.__aenter__()
    await workers.wait_listening()
    stopping = asyncio.create_task(workers.__aexit__(None, None, None))
    for _ in range(3):
        await asyncio.sleep(0)
        stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert all(process.returncode is not None for process in workers._processes)
    assert (alive(tmp_path), left_behind(tmp_path)) == ([], [])


@pytest.mark.parametrize(
    ("count", "threads", "text"),
    [
        (0, None, r"--shards must be in \[1, 64\] for an embedded mesh, found 0"),
        (MAX_SHARDS + 1, None, "found 65"),
        (1, 0, "--threads must be >= 1, found 0"),
    ],
)
def test_numbers_out_of_range_are_refused(count: int, threads: int | None, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        EmbeddedWorkers(count, "cpu", threads)


def test_cores_are_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    assert [EmbeddedWorkers(count, "cpu", None)._threads for count in (1, 2, 4, 20)] == [9, 4, 2, 1]
