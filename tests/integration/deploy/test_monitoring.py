"""Alarms and the Grafana dashboard: every metric and label in them is served, and each alarm leads to an action."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.states import State, Store
from celery_capacity.workers.supervision.metric_names import METRICS, Server, series_of
from tests.fixtures.processes.platforms import ROOT

ALERTS = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
NIGHT = (ROOT / "docs" / "how-to" / "at-night.md").read_text(encoding="utf-8")
#: Labels of each series, by its name.
LABELS = {series: {*metric.labels, "le"} for metric in METRICS for series in series_of(metric)}
#: Values that a label may have.
VALUES: dict[str, set[str]] = {
    "store": {"redis", *map(str, Store)},
    "state": {*map(str, State)},
    "resource": {"cpus", "memory"},
    "result": {"done", "failed", "skipped", "left"},
    "reason": {*map(str, Refusal)},
}


def expressions() -> Iterator[str]:
    """Yield each query of the alarms and of the dashboard."""
    yield from (rule["expr"] for rule in RULES)
    yield from (target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_query_names_only_series_and_labels_that_are_served(expression: str) -> None:
    series = re.findall(r"\b(platform_\w+)(?:\{([^}]*)\})?", expression)
    assert series, "a query reads something of the platform"
    for name, matchers in series:
        assert name in LABELS
        for label, operator, value in re.findall(r'(\w+)(=~|=)"([^"]*)"', matchers):
            assert label in LABELS[name]
            pattern = value if operator == "=~" else re.escape(value)
            assert any(re.fullmatch(pattern, possible) for possible in VALUES[label]), value
    grouped = {word for group in re.findall(r"\bby \(([^)]*)\)", expression) for word in re.findall(r"\w+", group)}
    assert grouped <= set().union(*(LABELS[name] for name, _ in series))
    assert expression.count("(") == expression.count(")")


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_query_counts_a_worker_once_where_workers_are_scraped_too(expression: str) -> None:
    shared = {metric.name for metric in METRICS if set(metric.served_by) == set(Server)}
    for name in re.findall(r"platform_\w+", expression):
        if name in shared:
            assert re.search(rf"\bmax(?: by \(\w+\) )?\((?:max_over_time\()?{name}\b", expression), name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool (Debian: apt install prometheus)")
def test_prometheus_takes_the_rules_and_every_query(tmp_path: Path) -> None:
    queries = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(sorted(set(expressions())))]
    panels = tmp_path / "queries.yaml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": queries}]}), encoding="utf-8")
    alerts = ROOT / "deploy" / "prometheus" / "alerts.yaml"
    command = ["promtool", "check", "rules", str(alerts), str(panels)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alarm_leads_to_a_section_with_an_action() -> None:
    sections = re.findall(r"^## (\w+)$", NIGHT, re.MULTILINE)
    assert [rule["alert"] for rule in RULES] == sections
    for rule in RULES:
        assert rule["annotations"]["action"] == f"docs/how-to/at-night.md#{rule['alert'].lower()}"
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["annotations"]["summary"].endswith(".")


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
