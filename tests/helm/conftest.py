"""The chart's tests need helm; without it they are skipped, and say so."""

import pytest

from tests.helm.chart import find_tool


@pytest.fixture(autouse=True, scope="session")
def _helm() -> None:
    if find_tool("helm") is None:
        pytest.skip("helm is not on the PATH: `make k8s-tools` puts it into .venv/bin")
