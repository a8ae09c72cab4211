"""Rules and dashboards in files/ go into the cluster as they are; promtool reads the rules, where there is one."""

import json
import subprocess

import pytest
import yaml

from tests.helm.chart import CHART, render
from tests.observability.prometheus import find_program

RULES = CHART / "files" / "rules.yaml"
PROMTOOL = find_program("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is missing: it comes with Prometheus")
def test_promtool_takes_the_rules() -> None:
    assert PROMTOOL
    command = [PROMTOOL, "check", "rules", "--lint-fatal", str(RULES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_the_files_and_what_prometheus_selects() -> None:
    rule = render({"metrics.rules": True, "metrics.labels": {"release": "prometheus"}}).get("PrometheusRule", "mesh-coordinator")
    assert rule["spec"] == yaml.safe_load(RULES.read_text())
    assert rule["metadata"]["labels"]["release"] == "prometheus"


def test_dashboards_are_the_files_and_what_grafana_looks_for() -> None:
    dashboards = render({"metrics.dashboard": True}).get("ConfigMap", "mesh-dashboards")
    files = {path.name: json.loads(path.read_text()) for path in (CHART / "files").glob("*.json")}
    assert {name: json.loads(text) for name, text in dashboards["data"].items()} == files
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
