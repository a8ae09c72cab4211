""".github/workflows: what they name is there."""

import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    return list(chain.from_iterable(job["steps"] for job in jobs))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_commands_are_of_this_repository(workflow: Path) -> None:
    scripts = "\n".join(step["run"] for step in steps(workflow) if "run" in step)
    assert set(re.findall(r"\bmake ([a-z0-9-]+)", scripts)) <= TARGETS
    for program in re.findall(r"(?:^|\s)(\.\w+/\S+)", scripts):
        assert (ROOT / program).exists(), program


def test_workflows_run_what_a_developer_runs_and_the_clusters_tests() -> None:
    scripts = {step["run"].strip() for workflow in WORKFLOWS for step in steps(workflow) if "run" in step}
    assert "SHARDMESH_REQUIRE_PROMETHEUS=1 .ci/run" in scripts
    assert any("make test-kind" in script for script in scripts)


def test_the_cluster_is_the_one_that_the_makefile_looks_for() -> None:
    (kind,) = [step for path in WORKFLOWS for step in steps(path) if step.get("uses", "").startswith("helm/kind-action@")]
    assert (ROOT / kind["with"]["config"]).exists()
    assert f"CLUSTER := {kind['with']['cluster_name']}\n" in (ROOT / "Makefile").read_text()


def test_the_two_commands_of_the_page_are_run() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text().partition("## Two commands")[2].partition("\n## ")[0]
    commands = [
        re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() for block in re.findall(r"(?:^    .*\n)+", page, re.MULTILINE)
    ]
    assert len(commands) == 2
    scripts = [step["run"].strip() for workflow in WORKFLOWS for step in steps(workflow) if "run" in step]
    assert set(commands) <= set(scripts)


def test_torch_is_that_of_the_makefile_unless_the_repository_says_otherwise() -> None:
    (said,) = re.findall(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {yaml.safe_load(path.read_text())["env"]["TORCH"] for path in WORKFLOWS} == {f"${{{{ vars.TORCH || '{said}' }}}}"}
