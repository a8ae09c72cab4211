"""What is asked of Prometheus: the queries of the dashboard and of the rules, and the series and labels that they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
FILES = ROOT / "helm" / "shardmesh" / "files"
DASHBOARD = FILES / "shardmesh.json"
RULES = FILES / "rules.yaml"

TARGET_LABELS = {"instance", "job", "namespace", "pod"}
"""Prometheus itself adds them to whatever it scrapes."""

_NAME = r"(?P<name>(?:shardmesh|process)_\w+)"
_SELECTOR = re.compile(rf"(?<![:\w]){_NAME}(?:\{{(?P<matchers>[^}}]*)\}})?")
_GROUPING = re.compile(r"\b(?:by|on|without|ignoring) \((?P<labels>[^)]*)\)")


@dataclass(frozen=True)
class Query:
    where: str
    text: str

    @property
    def may_be_empty(self) -> bool:
        """Asks only for what is above 0, or for alerts: nothing is good news."""
        return self.text.endswith("> 0") or self.where.startswith("alert")

    def selectors(self) -> Iterator[tuple[str, set[str]]]:
        """Names of series, each with the labels that are asked of it."""
        for match in _SELECTOR.finditer(self.text):
            yield match["name"], set(re.findall(r"(\w+)\s*[=!]~?", match["matchers"] or ""))

    def groupings(self) -> set[str]:
        return {label.strip() for match in _GROUPING.finditer(self.text) for label in match["labels"].split(",")} - {""}


def queries() -> list[Query]:
    dashboard = json.loads(DASHBOARD.read_text())
    found = [
        Query(f"panel {panel['title']}", target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]
    found += [Query(f"annotation {one['name']}", one["expr"]) for one in dashboard["annotations"]["list"]]
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    found += [Query(f"alert {rule['alert']}" if "alert" in rule else f"record {rule['record']}", rule["expr"]) for rule in rules]
    return [Query(one.where, one.text.replace("$__rate_interval", "30s").replace("$instance", ".*").strip()) for one in found]
