"""What a mesh at work tells Prometheus: every query of the dashboard and of the rules finds what it asks for."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.app import Coordinator
from protos.errors import InvalidArgument
from protos.generation_pb2 import GenerateRequest, TokenIds
from tests.mesh.conftest import Mesh, MeshMaker
from tests.observability.prometheus import PROGRAM, fetch, find_program, prometheus
from tests.observability.promql import ROOT, TARGET_LABELS, Query, queries

PROMTOOL = find_program("promtool")
DOCS = ROOT / "docs" / "observability.md"


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("qwen3_moe")


def url_of(coordinator: Coordinator) -> str:
    assert coordinator.metrics_url
    return coordinator.metrics_url


async def scrape(running: Mesh) -> str:
    return await asyncio.to_thread(fetch, url_of(running.coordinator))


@asynccontextmanager
async def at_work(mesh: MeshMaker, checkpoint: Path) -> AsyncIterator[Mesh]:
    """Two shards and a spare, after a prompt of several chunks, a refusal and a caller who left."""
    async with mesh(checkpoint, 2, spares=1, metrics_listen="127.0.0.1:0", max_rows=64, max_running=8) as running:
        with pytest.raises(InvalidArgument):
            await running.generate([1], 100000)
        request = GenerateRequest(token_ids=TokenIds(ids=[1, 2]), max_tokens=400, ignore_eos=True)
        async with contextlib.aclosing(running.client.generate(request)) as responses:
            async for response in responses:
                if response.WhichOneof("event") == "delta":
                    break
        async with asyncio.timeout(10):
            aborted = 0.0
            while not aborted:
                aborted = value(await scrape(running), 'shardmesh_request_success_total{finished_reason="abort"}')
        await asyncio.gather(running.generate([5, 6, 7], 12), running.generate(list(range(3, 150)), 6))
        yield running


def samples(text: str) -> dict[str, list[dict[str, str]]]:
    """Labels of each series, by its name."""
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name].append(sample.labels)
    return found


def value(text: str, series: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{series} ")]
    return float(line.rpartition(" ")[2])


async def test_every_query_names_series_and_labels_that_there_are(mesh: MeshMaker, checkpoint: Path) -> None:
    async with at_work(mesh, checkpoint) as running:
        found = samples(await scrape(running))
    wrong = []
    for query in queries():
        known = set(TARGET_LABELS)
        for name, labels in query.selectors():
            own = {label for series in found.get(name, ()) for label in series} | TARGET_LABELS
            known |= own
            if name not in found or not labels <= own:
                wrong.append((query.where, name, labels - own))
        if not query.groupings() <= known:
            wrong.append((query.where, "grouping", query.groupings() - known))
    assert wrong == []
    assert len(queries()) > 50


async def test_what_is_told_adds_up(mesh: MeshMaker, checkpoint: Path) -> None:
    async with at_work(mesh, checkpoint) as running:
        text = await scrape(running)
        addresses = [worker.address for worker in running.workers]
    generated = value(text, "shardmesh_generation_tokens_total")
    assert generated >= 18
    assert value(text, "shardmesh_prompt_tokens_total") == 3 + 147 + 2
    assert value(text, 'shardmesh_request_success_total{finished_reason="length"}') == 2
    assert value(text, 'shardmesh_request_success_total{finished_reason="abort"}') == 1
    assert value(text, 'shardmesh_request_failure_total{reason="INVALID_ARGUMENT"}') == 1
    assert value(text, "shardmesh_time_to_first_token_seconds_count") + value(
        text, "shardmesh_inter_token_latency_seconds_count"
    ) == pytest.approx(generated)
    assert value(text, "shardmesh_request_generation_tokens_count") == 3
    assert (value(text, "shardmesh_workers_reachable"), value(text, "shardmesh_spares")) == (3, 1)
    assert value(text, "shardmesh_serving") == value(text, "shardmesh_epoch") == 1
    assert value(text, "shardmesh_shards") == value(text, "shardmesh_wanted_shards") == 2
    assert value(text, "shardmesh_reshards_total") == 0
    # Three layers, attention and experts each, and the head.
    steps = value(text, 'shardmesh_steps_total{phase="decode"}')
    assert value(text, 'shardmesh_rounds_total{phase="decode"}') == 7 * steps
    assert 1 <= value(text, 'shardmesh_straggler_ratio{phase="decode"}') <= 2
    # Experts of 4 for each row of each layer, but in the last layer, where only rows that are sampled from go on.
    assert value(text, 'shardmesh_expert_choices_total{layer="0"}') % 4 == 0
    assert value(text, 'shardmesh_expert_choices_total{layer="0"}') > value(text, 'shardmesh_expert_choices_total{layer="2"}') > 0
    assert 1 <= value(text, 'shardmesh_expert_imbalance{layer="1"}') <= 16
    serving = {labels["worker"] for labels in samples(text)["shardmesh_worker_compute_seconds_total"]}
    assert len(serving) == 2
    assert serving < set(addresses)
    parts = [
        sum(value(text, f'shardmesh_worker_{part}_seconds_total{{phase="decode",worker="{worker}"}}') for worker in serving)
        for part in ("compute", "queue", "wire", "wait")
    ]
    assert sum(parts) == pytest.approx(2 * value(text, 'shardmesh_round_seconds_total{phase="decode"}'), rel=1e-6)


async def test_docs_list_every_metric_of_a_coordinator_and_no_other(mesh: MeshMaker, checkpoint: Path) -> None:
    async with at_work(mesh, checkpoint) as running:
        families = {family.name for family in text_string_to_metric_families(await scrape(running))}
    told = {re.sub("_total$", "", name) for name in re.findall(r"^\| `(shardmesh_(?!shard_)\w+)", DOCS.read_text(), re.MULTILINE)}
    assert told == {name for name in families if name.startswith("shardmesh_")}


async def test_without_metrics_nothing_is_remembered(mesh: MeshMaker, checkpoint: Path) -> None:
    async with mesh(checkpoint, 1) as running:
        await running.generate([1, 2], 2)
        described = await running.client.mesh()
        assert running.coordinator.metrics_url is None
    assert not described.hottest_experts
    assert described.workers[0].rounds.compute_ns == 0


async def test_the_hottest_experts_and_each_workers_part_are_told_to_people_too(mesh: MeshMaker, checkpoint: Path) -> None:
    async with at_work(mesh, checkpoint) as running:
        described = await running.client.mesh()
    hottest = described.hottest_experts
    assert len(hottest) == 16
    assert [one.over_mean for one in hottest] == sorted((one.over_mean for one in hottest), reverse=True)
    assert all(one.over_mean == pytest.approx(16 * one.share) for one in hottest)
    assert all((worker.rounds.compute_ns > 0) == worker.serving for worker in described.workers)


async def test_an_address_that_is_taken_is_refused_in_one_line(mesh: MeshMaker, checkpoint: Path) -> None:
    async with mesh(checkpoint, 1, metrics_listen="127.0.0.1:0") as running:
        taken = url_of(running.coordinator).removeprefix("http://").removesuffix("/metrics")
        with pytest.raises(InvalidArgument, match=rf"^cannot listen on {taken} for metrics: Address already in use$"):
            async with mesh(checkpoint, 1, metrics_listen=taken):
                pass


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is missing: it comes with Prometheus")
async def test_promtool_finds_nothing_amiss_in_the_metrics(mesh: MeshMaker, checkpoint: Path) -> None:
    async with at_work(mesh, checkpoint) as running:
        text = await scrape(running)
    assert PROMTOOL
    done = await asyncio.to_thread(
        subprocess.run, [PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.skipif(PROGRAM is None, reason="prometheus is missing: its own answers to the queries are not looked at")
async def test_a_real_prometheus_answers_every_query(mesh: MeshMaker, checkpoint: Path, tmp_path: Path) -> None:
    async with at_work(mesh, checkpoint) as running:
        target = url_of(running.coordinator).removeprefix("http://").removesuffix("/metrics")
        (tmp_path / "prometheus").mkdir()
        async with prometheus(tmp_path / "prometheus", target) as server:
            await server.wait_samples("shardmesh_serving", 2)
            await running.generate([3, 4, 5], 20)
            await server.wait_samples("shardmesh:straggler_ratio:rate5m", 2)
            asked: list[Query] = queries()
            results = {query: (await server.get("query", query=query.text))["result"] for query in asked}
            (scraped,) = (await server.get("targets"))["activeTargets"]
            groups = (await server.get("rules"))["groups"]
    empty = [query.where for query, result in results.items() if not result and not query.may_be_empty]
    assert empty == []
    assert (scraped["health"], scraped["lastError"]) == ("up", "")
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    assert [rule["name"] for group in groups for rule in group["rules"] if rule.get("state") in {"pending", "firing"}] == []
