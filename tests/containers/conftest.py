"""Tests with the marker `containers` need podman and the images; without them they are skipped, and say so."""

import os

import pytest

from tests.containers.engine import missing


@pytest.fixture(scope="session")
def _containers() -> str | None:
    return missing()


@pytest.fixture(autouse=True)
def _need_containers(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("containers") is None:
        return
    reason = request.getfixturevalue("_containers")
    if reason and os.environ.get("SHARDMESH_REQUIRE_CONTAINERS"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
