"""Alerts fire when they should and only then, says Prometheus's own tool; skipped where promtool is missing."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.observability.prometheus import find_program

ROOT = Path(__file__).parents[2]
RULES = ROOT / "helm" / "shardmesh" / "files" / "rules.yaml"
CASES = Path(__file__).with_name("alerts.yaml")
PROMTOOL = find_program("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is missing: it comes with Prometheus")
def test_alerts_fire_on_what_they_are_for_and_on_nothing_else(tmp_path: Path) -> None:
    assert PROMTOOL
    shutil.copy(RULES, tmp_path)
    shutil.copy(CASES, tmp_path)
    command = [PROMTOOL, "test", "rules", CASES.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_and_every_record_is_tested() -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    tests = yaml.safe_load(CASES.read_text())["tests"]
    fired = {test["alertname"] for one in tests for test in one["alert_rule_test"] if "exp_alerts" in test}
    assert fired == {rule["alert"] for rule in rules if "alert" in rule}
    records = {test["expr"].partition("{")[0] for one in tests for test in one.get("promql_expr_test", [])}
    assert records == {rule["record"] for rule in rules if "record" in rule}
