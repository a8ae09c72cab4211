"""Workers that do not see the model's folder: the coordinator sends them what they ask for."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.workers import supplier
from protos import rpc, shardworker_pb2
from protos.errors import MeshError, ModelError
from shardworker.source import Folder, Supplied
from tests.mesh.conftest import MeshMaker

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("qwen3_moe")


@pytest.fixture
def _blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker reads a folder."""

    def refuse(self: Folder, directory: str, files: Any) -> None:
        del self, files
        raise ModelError(f"no folder {directory!r}")

    monkeypatch.setattr(Folder, "__init__", refuse)


@pytest.mark.parametrize(("shards", "quantization"), [(1, "none"), (3, "none"), (2, "int4")])
async def test_what_is_sent_is_what_a_folder_holds(
    checkpoint: Path, mesh: MeshMaker, request: pytest.FixtureRequest, shards: int, quantization: str
) -> None:
    async with mesh(checkpoint, shards, quantization=quantization) as running:
        expected = await running.generate(PROMPT, 12, logprobs=3)
    request.getfixturevalue("_blind")
    async with mesh(checkpoint, shards, quantization=quantization, weights="stream") as running:
        found = await running.generate(PROMPT, 12, logprobs=3)
        assert not running.workers[0]._holding.supplies
    assert found.tokens == expected.tokens
    assert found.logprobs == expected.logprobs


@pytest.mark.usefixtures("_blind")
async def test_only_what_a_shard_needs_is_sent(checkpoint: Path, mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    honest = supplier.Supplier._read
    monkeypatch.setattr(supplier.Supplier, "_read", lambda self, wanted: sent.append(len(data := honest(self, wanted))) or data)
    async with mesh(checkpoint, 2, weights="stream") as running:
        held = sum(worker.weights_bytes for worker in (await running.client.mesh()).workers)
    file = checkpoint / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    # In f32 what is held is what was read, and both read the header; norms of heads are kept once a head.
    assert held - 20_000 < sum(sent) - 2 * header <= held


@pytest.mark.usefixtures("_blind")
async def test_a_spare_is_supplied_when_it_is_needed(checkpoint: Path, mesh: MeshMaker) -> None:
    async with mesh(checkpoint, 2, spares=1, weights="stream") as running:
        expected = (await running.generate(PROMPT, 12)).tokens
        await running.workers[0].stop(0)
        assert (await running.generate(PROMPT, 12)).tokens == expected


@pytest.mark.usefixtures("_blind")
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (shardworker_pb2.SuppliedBytes(number=1, error="the disk is gone"), "the disk is gone"),
        (shardworker_pb2.SuppliedBytes(number=9, data=b"x"), "answered something else than number 1"),
        (shardworker_pb2.SuppliedBytes(number=1, data=b"x"), "wanted 8 bytes at 0, was sent 1"),
        (None, "sent nothing for 0.2 s"),
    ],
    ids=["error", "number", "length", "silent"],
)
async def test_a_coordinator_that_does_not_send_it_is_one_clear_error(
    checkpoint: Path,
    mesh: MeshMaker,
    monkeypatch: pytest.MonkeyPatch,
    answer: shardworker_pb2.SuppliedBytes | None,
    error: str,
) -> None:
    async def lie(*_: Any) -> shardworker_pb2.SuppliedBytes:
        return answer or await asyncio.Event().wait()  # type: ignore[return-value]

    monkeypatch.setattr(supplier.Supplier, "answer", lie)
    monkeypatch.setattr(rpc, "SUPPLY_SILENCE_S", 0.2)
    with pytest.raises(MeshError, match=error):
        async with mesh(checkpoint, 1, weights="stream"):
            pass


@pytest.mark.usefixtures("_blind")
async def test_headers_longer_than_a_message_come_in_several(
    checkpoint: Path, mesh: MeshMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardworker.source.MAX_SUPPLY_BYTES", 1000)
    reads: list[int] = []
    honest = Supplied.read_into
    monkeypatch.setattr(
        Supplied,
        "read_into",
        lambda self, file, pieces, buffer: (reads.append(len(buffer)), honest(self, file, pieces, buffer))[1],
    )
    async with mesh(checkpoint, 1, weights="stream") as running:
        assert max(reads[:2]) > 1000
        assert len((await running.generate(PROMPT, 3)).tokens) == 3


async def test_a_load_without_an_offer_is_refused(checkpoint: Path, mesh: MeshMaker, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    async with mesh(copy, 1) as running:
        pool, status = running.coordinator._pool, running.coordinator._status
        assert status is not None
        shard = status.plan.shards[0]
        (client,) = pool.clients.values()
        load = shardworker_pb2.LoadRequest(
            protocol_version=rpc.PROTOCOL_VERSION,
            plan=shard,
            shard_digests=status.plan.shard_digests,
            assignment=99,
            supplied=True,
        )
        # What is held needs nobody's bytes.
        assert [response.WhichOneof("event") async for response in client.load(load)] == ["loaded"]
        await running.workers[0]._holding.release(99)
        with pytest.raises(MeshError, match="nobody offers them: call Supply first"):
            [response async for response in client.load(load)]
