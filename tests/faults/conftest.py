"""Meshes of real processes that tests break."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.faults.cuts import WIDE_WORKERS
from tests.faults.mesh import Mesh, mesh_of
from tests.faults.streams import Caller, Outcome
from tests.tiny import add_tokenizer, make_checkpoint


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MoE model with a tokenizer."""
    directory = tmp_path_factory.mktemp("model") / "glm4_moe"
    make_checkpoint("glm4_moe", directory)
    add_tokenizer(directory)
    return directory


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder for sockets, whose paths must be short, which tmp_path's is not."""
    with tempfile.TemporaryDirectory(prefix="shardmesh-faults-") as directory:
        yield Path(directory)


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def mesh(model: Path) -> AsyncIterator[Mesh]:
    """Two shards and a spare; each test mends what it broke."""
    async with mesh_of(model, 3) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def wide(model: Path) -> AsyncIterator[Mesh]:
    """Workers for up to four shards and a spare."""
    async with mesh_of(model, WIDE_WORKERS) as running:
        yield running


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def expected(mesh: Mesh) -> dict[str, Outcome]:
    """What each stream gives when nothing disturbs it."""
    async with mesh.coordinator() as (_, caller):
        return await caller.generate_all()


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def coordinator(mesh: Mesh, expected: dict[str, Outcome]) -> AsyncIterator[Caller]:
    """A coordinator on the mesh."""
    del expected  # its coordinator comes first, and goes
    async with mesh.coordinator("served") as (_, caller):
        yield caller


@pytest_asyncio.fixture(loop_scope="package")
async def served(mesh: Mesh, coordinator: Caller) -> AsyncIterator[Caller]:
    """A coordinator on a mesh that is made whole after the test."""
    yield coordinator
    await mesh.mend(coordinator)
