"""Rules and dashboards in files/ go into the cluster as those of one release; promtool reads the rules, where there is one."""

import copy
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helm.chart import CHART, Document, render
from tests.observability.prometheus import find_program

RULES = CHART / "files" / "rules.yaml"
PROMTOOL = find_program("promtool")


def rules_of(release: str) -> Document:
    (rule,) = render({"metrics.rules": True}, release=release).of_kind("PrometheusRule")
    spec: Document = rule["spec"]
    return spec


@pytest.mark.parametrize("rendered", [False, True])
@pytest.mark.skipif(PROMTOOL is None, reason="promtool is missing: it comes with Prometheus")
def test_promtool_takes_the_rules(rendered: bool, tmp_path: Path) -> None:
    assert PROMTOOL
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump(rules_of("mesh")) if rendered else RULES.read_text())
    command = [PROMTOOL, "check", "rules", "--lint-fatal", str(rules)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_the_files_and_what_prometheus_selects() -> None:
    rule = render({"metrics.rules": True, "metrics.labels": {"release": "prometheus"}}).get("PrometheusRule", "mesh-coordinator")
    pods = r'namespace="models",pod=~"mesh-coordinator-\[a-z0-9\]\+-\?\[a-z0-9\]\{5\}"'
    plain = copy.deepcopy(rule["spec"])
    for group in plain["groups"]:
        for one in group["rules"]:
            one["expr"] = re.sub(rf"\{{{pods}\}}", "", re.sub(f"{pods},", "", one["expr"]))
    assert plain == yaml.safe_load(RULES.read_text())
    assert rule["metadata"]["labels"]["release"] == "prometheus"


def test_every_series_of_a_rule_is_that_of_the_release() -> None:
    for group in rules_of("mesh")["groups"]:
        for rule in group["rules"]:
            series = re.findall(r"shardmesh[_:]\w+(?::\w+)?(.{23})", rule["expr"])
            assert series
            assert set(series) == {'{namespace="models",pod'}, rule["expr"]


@pytest.mark.parametrize(("release", "fires"), [("mesh", True), ("mesh-coordinator", False)])
@pytest.mark.skipif(PROMTOOL is None, reason="promtool is missing: it comes with Prometheus")
def test_alerts_are_of_one_release(release: str, fires: bool, tmp_path: Path) -> None:
    assert PROMTOOL
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules_of(release)))
    # A coordinator of the release called mesh.
    labels = 'namespace="models",pod="mesh-coordinator-7bd9-x2vbn"'
    samples = [{"labels": '{severity="critical"}', "value": 1}] if fires else []
    case = {
        "interval": "1m",
        "input_series": [
            {"series": f"shardmesh_serving{{{labels}}}", "values": "0x40"},
            {"series": f'shardmesh_request_failure_total{{{labels},reason="INTERNAL"}}', "values": "0+60x40"},
            {"series": f'shardmesh_request_success_total{{{labels},finished_reason="stop"}}', "values": "0+60x40"},
            # Of another release's rules: the same name, and this release's labels.
            {"series": f"shardmesh:request_failures:ratio5m{{{labels}}}", "values": "_x40" if fires else "0.5x40"},
        ],
        "promql_expr_test": [
            {
                "expr": f'count by (severity) (ALERTS{{alertname="{alert}",alertstate="firing"}})',
                "eval_time": "30m",
                "exp_samples": samples,
            }
            for alert in ("ShardmeshNotServing", "ShardmeshRequestsFail")
        ],
    }
    tests = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [case]}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    command = [PROMTOOL, "test", "rules", "tests.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dashboards_are_the_files_and_what_grafana_looks_for() -> None:
    dashboards = render({"metrics.dashboard": True}).get("ConfigMap", "mesh-dashboards")
    files = {path.name: json.loads(path.read_text()) for path in (CHART / "files").glob("*.json")}
    assert set(dashboards["data"]) == {f"models_mesh_{name}" for name in files}
    for name, file in files.items():
        made = json.loads(dashboards["data"][f"models_mesh_{name}"])
        assert made.pop("title") == f"{file.pop('title')} models/mesh"
        assert made.pop("uid").startswith(file.pop("uid"))
        (of_file,), (of_made,) = (
            [variable for variable in one["templating"]["list"] if variable["name"] == "instance"] for one in (file, made)
        )
        # All of them are those that are found, and these are of the release.
        assert of_file.pop("allValue") == ".*"
        series = r'namespace="models",pod=~"mesh-coordinator-[^"]+"'
        assert re.sub(rf"\{{{series}\}}", "", of_made["query"]["query"]) == of_file["query"]["query"] != of_made["query"]["query"]
        of_made["query"] = of_file["query"]
        assert made == file
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_dashboards_of_two_releases_are_two() -> None:
    seen: set[str] = set()
    for release, namespace in (("mesh", "models"), ("other", "models"), ("mesh", "elsewhere")):
        (found,) = (
            render({"metrics.dashboard": True}, release=release, namespace=namespace)
            .get("ConfigMap", f"{release}-dashboards")["data"]
            .items()
        )
        uid = json.loads(found[1])["uid"]
        assert len(uid) <= 40
        assert not {found[0], uid} & seen
        seen |= {found[0], uid}
