"""What a worker tells Prometheus, before and after it served a round."""

import asyncio
import re
from pathlib import Path

import pytest

from protos.errors import InvalidArgument
from shardworker.app import RunningWorker, start_worker
from shardworker.holding import Holding
from tests.observability.prometheus import fetch

DOCS = Path(__file__).parents[2] / "docs" / "observability.md"


async def told(worker: RunningWorker) -> dict[str, float]:
    assert worker.metrics_url
    text = await asyncio.to_thread(fetch, worker.metrics_url)
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("shardmesh_shard_")
    }


def holding_of(worker: RunningWorker) -> Holding:
    return worker._holding


async def test_docs_list_every_metric_and_rounds_are_counted(tmp_path: Path) -> None:
    worker = await start_worker(f"unix:{tmp_path}/w", device="cpu", threads=1, metrics_listen="127.0.0.1:0")
    try:
        tally = holding_of(worker).tally
        assert (await told(worker))["shardmesh_shard_loaded"] == 0
        tally.add("attend", 2_000_000_000, 500_000_000)
        tally.add("attend", 1_000_000_000, 0)
        tally.faults["STALE_EPOCH"] += 1
        found = await told(worker)
    finally:
        await worker.stop(0)
    assert found['shardmesh_shard_rounds_total{action="attend"}'] == 2
    assert found['shardmesh_shard_compute_seconds_total{action="attend"}'] == 3
    assert found['shardmesh_shard_queue_seconds_total{action="attend"}'] == 0.5
    assert found['shardmesh_shard_faults_total{reason="STALE_EPOCH"}'] == 1
    assert found["shardmesh_shard_memory_total_bytes"] >= found["shardmesh_shard_memory_free_bytes"] > 0
    documented = set(re.findall(r"^\| `(shardmesh_shard_\w+)", DOCS.read_text(), re.MULTILINE))
    assert documented == {name.partition("{")[0] for name in found}


async def test_an_address_that_is_taken_or_none_is_refused_in_one_line(tmp_path: Path) -> None:
    first = await start_worker(f"unix:{tmp_path}/a", device="cpu", threads=1, metrics_listen="127.0.0.1:0")
    try:
        assert first.metrics_url
        taken = first.metrics_url.removeprefix("http://").removesuffix("/metrics")
        with pytest.raises(InvalidArgument, match=rf"^cannot listen on {taken} for metrics: Address already in use$"):
            await start_worker(f"unix:{tmp_path}/b", device="cpu", threads=1, metrics_listen=taken)
        # Nothing of it is left.
        assert not (tmp_path / "b").exists()
    finally:
        await first.stop(0)
    with pytest.raises(InvalidArgument, match="--metrics-listen must be HOST:PORT"):
        await start_worker(f"unix:{tmp_path}/c", device="cpu", threads=1, metrics_listen="unix:/m")
