"""Runs of the fuzz tests tell what they sent."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch

from shardworker import kv, loader
from shardworker.memory import Memory
from tests.fuzz.campaign import MESSAGES, sent
from tests.fuzz.stack import Stack, make_model

if TYPE_CHECKING:
    from collections.abc import Iterator

FREE_BYTES = 64 * 2**20
"""What the workers here think is free: a plan may ask for all of it."""


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as one:
        yield one


@pytest.fixture(scope="module", autouse=True)
def _small_machine() -> Iterator[None]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for module in (kv, loader):
            patch.setattr(module, "device_memory", lambda _: Memory(FREE_BYTES, FREE_BYTES))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["glm4_moe_qk_norm", "olmoe"])
def stack(request: pytest.FixtureRequest, runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("model")
    make_model(request.param, directory)
    one = runner.run(Stack.start(directory, 2))
    # Workers collect garbage whenever sessions end; what the tests' own libraries made would be looked through each time.
    gc.collect()
    gc.freeze()
    yield one
    gc.unfreeze()
    for worker in one.workers:
        assert worker.executor.close(5)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not sent:
        return
    seed = config.getoption("--hypothesis-seed") or "fixed"
    terminalreporter.section(f"fuzz: {sum(sent.values())} messages sent of about {MESSAGES} wanted, seed {seed}")
    for kind, count in sorted(sent.items()):
        terminalreporter.line(f"{count:9d}  {kind}")
