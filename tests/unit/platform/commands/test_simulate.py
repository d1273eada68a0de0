"""`simulate` prints what the policy would do with a trace, as text and as JSON, and writes the log of `demo`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from celery_capacity.platform.commands.simulate import _anywhere, command
from celery_capacity.platform.demo.simulated import books_of
from celery_capacity.platform.processes.launch import WorkerSpec
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.simulation.expectations import Exact
from celery_capacity.routing.simulation.jobs import Submission
from celery_capacity.routing.simulation.simulation import simulate
from celery_capacity.workers.display import progress_bar
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.documents.shapes import assert_shape

TRACE = "submit,run,cpus,user\n0,100,6,ann\n1,10,8,ann\n2,500,2,bob\n3,50,2,bob\n"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE, encoding="utf-8")
    return path


def run(*words: str) -> Result:
    return CliRunner().invoke(command, words)


def test_simulation_prints_waits_and_uses_of_the_workers(trace: Path) -> None:
    result = run("--trace", str(trace), "--worker", "big=8")
    assert result.exit_code == Exit.OK, result.output
    assert "4 jobs" in result.output
    assert "makespan  610.0 s" in result.output
    assert "mean 51.75 s, p50 0.00 s, p95 108.00 s, max 108.00 s" in result.output


def test_simulation_matches_its_schema_for_each_source(trace: Path) -> None:
    for source in ("exact", "learned", "recorded", "none"):
        result = run("--trace", str(trace), "--worker", "big=8", "--expected", source, "--json")
        assert result.exit_code == Exit.OK, result.output
        report = json.loads(result.stdout)
        assert_shape("simulate", report)
        assert (report["jobs"], report["workers"][0]["jobs"]) == (4, 4)


def test_depth_of_zero_lets_narrow_jobs_pass(trace: Path) -> None:
    greedy = json.loads(run("--trace", str(trace), "--worker", "big=8", "--depth", "0", "--json").stdout)
    assert greedy["wait_seconds"]["max"] == 501.0


def test_log_has_the_starts_of_all_jobs(trace: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    assert run("--trace", str(trace), "--worker", "big=8", "--log", str(log)).exit_code == Exit.OK
    with log.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["job"], float(row["start"])) for row in rows] == [("0", 0.0), ("3", 3.0), ("1", 100.0), ("2", 110.0)]
    assert {row["worker"] for row in rows} == {"big"}


def test_job_on_other_workers_keeps_its_placement_and_its_tenant() -> None:
    request = Request.of({"cpus": 1000, "alone": 1}).within("gpu")
    terms = ",?@node-7/arch:in:arm,+exclusive:spread,$physics"
    job = _anywhere(Submission("1", 0, 10, request, terms=terms))
    assert (job.request, job.terms) == (Request.of({"cpus": 1000, "alone": 1}), ",+exclusive:spread,$physics")
    books = books_of([WorkerSpec.parse(text) for text in ("big=4", "other=4")])
    simulation = simulate([job._replace(job=str(number)) for number in range(3)], books, Rules(), Exact())
    assert [start.started for start in simulation.starts] == [0, 0, 10]
    assert {start.worker for start in simulation.starts[:2]} == {"big", "other"}


def test_packaged_trace_waits_less_at_most_with_reservations() -> None:
    waits = [json.loads(run("--depth", depth, "--json").stdout)["wait_seconds"]["max"] for depth in ("0", "1")]
    assert waits[1] <= waits[0]


def test_too_wide_a_job_is_refused_before_the_simulation(trace: Path) -> None:
    result = run("--trace", str(trace), "--worker", "small=7")
    assert result.exit_code == Exit.FAILED
    assert "needs 8 CPUs" in result.output


SHARED = "submit,run,cpus,tenant\n" + "0,10,1,art\n" * 8 + "0,10,1,physics\n" * 8 + "0,10,1,\n"


def test_tenants_of_a_trace_start_by_their_weights(tmp_path: Path) -> None:
    path = tmp_path / "shared.csv"
    path.write_text(SHARED, encoding="utf-8")
    means = []
    for weight in ("1", "3"):
        result = run("--trace", str(path), "--worker", "w=4", "--tenant", f"physics={weight}", "--depth", "0", "--json")
        assert result.exit_code == Exit.OK, result.output
        report = json.loads(result.stdout)
        assert_shape("simulate", report)
        means.append({line["tenant"]: line["wait_seconds"]["mean"] for line in report["tenants"]})
    assert [sorted(waits) for waits in means] == [["art", "default", "physics"]] * 2
    assert means[1]["physics"] < means[0]["physics"]
    assert means[1]["art"] > means[0]["art"]
    assert "physics" in run("--trace", str(path), "--worker", "w=2").output


def test_wrong_tenants_are_refused(tmp_path: Path) -> None:
    for text in ("physics", "physics=0", "a b=2", "physics=x"):
        assert run("--tenant", text).exit_code == Exit.USAGE
    assert "twice" in run("--tenant", "a=1", "--tenant", "a=2").output
    path = tmp_path / "wrong.csv"
    path.write_text("submit,run,cpus,tenant\n0,1,1,a/b\n", encoding="utf-8")
    refused = run("--trace", str(path))
    assert (refused.exit_code, "line 2 of the trace: tenant" in refused.output) == (Exit.FAILED, True)


def test_history_and_trace_exclude_each_other(trace: Path) -> None:
    refused = run("--trace", str(trace), "--from-history", "7d")
    assert (refused.exit_code, "neither --trace nor --scale" in refused.output) == (2, True)


def test_simulation_counts_its_jobs_in_a_bar(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "AFTER", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    result = run("--trace", str(trace), "--worker", "big=8", "--json")
    assert json.loads(result.stdout)["jobs"] == 4
    assert "4/4" in result.stderr
