"""The demo as a person runs it: a small trace through real workers, after which nothing is left behind."""

from __future__ import annotations

import csv
import json
import re
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.fixtures.processes.commanding import in_process
from tests.fixtures.processes.left_over import left_over
from tests.fixtures.processes.platforms import Platform

#: Ten jobs on 4 + 2 CPUs: they wait for each other, and one fills the larger worker.
TRACE = """\
# a small trace
submit,user,run,cpus
0,ann,3,2
0,bob,2,1
1,ann,2,4
1,bob,1,2
1,cid,1,0.5
2,ann,4,3
3,bob,1,1
4,cid,2,2
4,ann,0,1
5,bob,1,4
"""
RUNS = {0: 3, 1: 2, 2: 2, 3: 1, 4: 1, 5: 4, 6: 1, 7: 2, 8: 0, 9: 1}
CPUS = {0: 2, 1: 1, 2: 4, 3: 2, 4: 0.5, 5: 3, 6: 1, 7: 2, 8: 1, 9: 4}
CAPACITY = {"wide": 4.0, "slim": 2.0}

#: Environment that makes the demo start its own servers: an empty variable counts as not set.
PRIVATE: dict[str, Any] = {"REDIS_URL": "", "DATABASE_URL": ""}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "small.csv"
    path.write_text(TRACE)
    return path


def demo(trace: Path, *more: str) -> tuple[str, ...]:
    workers = [f"--worker={name}={cpus:g}" for name, cpus in CAPACITY.items()]
    return ("demo", "--trace", str(trace), "--scale", "4", *workers, *more)


def most_at_once(rows: list[dict[str, Any]], worker: str) -> float:
    """Return the most CPUs that ran at once on a worker, by adding up the jobs at the start of each job."""
    spans = [(float(row["start"]), float(row["end"]), CPUS[int(row["job"])]) for row in rows if row["worker"] == worker]
    return max((sum(c for start, end, c in spans if start <= at < end) for at, _, _ in spans), default=0.0)


@pytest.mark.long(35)
def test_demo_runs_a_trace_on_a_private_pair_and_reports_it(platform: Platform, trace: Path, tmp_path: Path) -> None:
    log, mark, temporary = tmp_path / "log.csv", uuid.uuid4().hex, tmp_path / "t"
    temporary.mkdir()
    options = ("--json", "--log", str(log), "--expected", "--whatif")
    done = platform.celery(*demo(trace, *options), **PRIVATE, DEMO_MARK=mark, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert (report["jobs"], report["states"], report["scale"]) == (10, {"succeeded": 10}, 4)
    assert report["invariants"]["holds"]
    assert report["invariants"]["at_rest"]

    header, *lines = log.read_text().splitlines()
    assert header == "job,start,end,worker"
    rows = list(csv.DictReader([header, *lines]))
    assert sorted(int(row["job"]) for row in rows) == list(range(10))
    for row in rows:
        slept = float(row["end"]) - float(row["start"])
        assert slept >= max(RUNS[int(row["job"])] / 4, 0.05) - 0.001
    for worker in report["workers"]:
        most = most_at_once(rows, worker["name"])
        assert worker["cpus"] == CAPACITY[worker["name"]]
        assert most == worker["peak_cpus"] <= worker["cpus"]
        assert 0 < worker["average_cpus"] <= worker["peak_cpus"]
        assert worker["jobs"] == sum(row["worker"] == worker["name"] for row in rows)
    # Two jobs want all of the larger worker.
    assert {w["name"]: w["peak_cpus"] for w in report["workers"]}["wide"] == 4
    last = max(float(row["end"]) for row in rows)
    assert report["makespan_seconds"] == pytest.approx(last, abs=0.01)
    assert report["wait_seconds"]["max"] >= report["wait_seconds"]["p95"] >= 0
    # The job that wants all of the larger worker waits for the first one. All run times are known.
    assert report["forecasts"]
    for forecast in report["forecasts"]:
        assert 0 < forecast["waiting"] <= 10
        assert forecast["guessed"] == 0
        for side in ("predicted", "real"):
            assert forecast["empty_seconds"][side] >= forecast["wait_mean_seconds"][side] >= 0

    assert left_over(mark) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.long
def test_on_given_servers_it_makes_the_tables_and_takes_away_what_it_made(platform: Platform, trace: Path) -> None:
    from celery_capacity.migrations import downgrade

    downgrade(str(platform.settings.database_url), "base")
    done = platform.celery(*demo(trace, "--whatif"))
    assert done.returncode == 0, done.stderr
    output = done.stdout
    assert re.search(r"^forecast at +waiting +empty in +real +mean wait +real$", output, re.MULTILINE)
    assert "jobs      10: 10 succeeded" in output
    assert "makespan" in output
    assert re.search(r"^worker +allocated on average +peak +jobs$", output, re.MULTILINE)
    assert re.search(r"^wide +[0-3]\.\d of 4 CPUs +4 +\d+$", output, re.MULTILINE)
    assert "invariants: I1, I2, I3, I4, I6 hold, at rest" in output
    assert f"{Path(sys.executable).parent}/celery -A platform up" in output or "  celery -A platform up" in output
    assert "10/10 finished" in done.stderr
    assert list(platform.redis.scan_iter("demo:*")) == []
    assert list(platform.redis.scan_iter("worker:*")) == []
    with platform.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM jobs WHERE state = 'succeeded'")).scalar_one() == 10


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_job_wider_than_every_worker_is_refused_before_anything_starts(
    platform: Platform, trace: Path, more: tuple[str, ...]
) -> None:
    trace.write_text(TRACE + "6,dan,1,5\n")
    done = in_process(platform.environment)(*demo(trace, *more))
    assert done.exit_code == 1
    message = json.loads(done.stdout)["detail"] if more else done.stderr
    assert "job 10 (line 13 of the trace) needs 5 CPUs" in message
    assert "--worker NAME=5" in message
    assert "Starting" not in done.stderr


@pytest.mark.parametrize(
    ("row", "said"),
    [("7,dan,x,1", "line 13 of the trace: run is not a number of seconds: 'x'"), ("7,dan,1,-2", "line 13")],
)
def test_a_bad_row_is_refused_with_its_line_and_value(platform: Platform, trace: Path, row: str, said: str) -> None:
    trace.write_text(TRACE + row + "\n")
    done = in_process(platform.environment)(*demo(trace))
    assert done.exit_code == 1
    assert said in done.stderr
    assert row.split(",")[2] in done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        ("--scale", "0"),
        ("--scale", "fast"),
        ("--worker", "a b=4"),
        ("--worker", "a"),
        ("--trace", "/nowhere.csv"),
    ],
)
def test_a_wrong_option_is_refused_with_its_value(platform: Platform, wrong: tuple[str, str]) -> None:
    done = in_process(platform.environment)("demo", *wrong)
    assert done.exit_code == 2
    assert wrong[1].partition("=")[0] in done.stderr


def test_a_log_that_cannot_be_written_is_told_before_anything_starts(platform: Platform, trace: Path) -> None:
    done = in_process(platform.environment)(*demo(trace, "--log", str(trace.parent / "nowhere" / "log.csv")))
    assert done.exit_code == 1
    assert "log.csv cannot be written" in done.stderr
    assert "Starting" not in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_that_a_demo_started(
    platform: Platform, trace: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    mark, temporary = uuid.uuid4().hex, tmp_path / "t"
    temporary.mkdir()
    arguments = ("demo", "--trace", str(trace), "--scale", "0.01", "--worker", "wide=4")
    running = platform.start("demo", *arguments, says="0/10 finished", **PRIVATE, DEMO_MARK=mark, TMPDIR=str(temporary))
    running.signal(signum)
    assert running.wait() == 128 + signum
    running.wait_for("Interrupted")
    assert left_over(mark) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.long
def test_interrupted_on_given_servers_it_revokes_what_has_not_run(platform: Platform, trace: Path) -> None:
    trace.write_text("submit,run,cpus\n" + "0,1,4\n" * 5)
    running = platform.start(
        "demo", "demo", "--trace", str(trace), "--scale", "1", "--worker", "wide=4", says="0/5 finished, 4 waiting"
    )
    running.signal(signal.SIGINT)
    assert running.wait() == 130
    with platform.engine.connect() as connection:
        states = connection.execute(text("SELECT state, count(*) FROM jobs GROUP BY state")).all()
    ended = {row[0]: row[1] for row in states}
    assert set(ended) <= {"cancelled", "succeeded"}
    assert ended["cancelled"] >= 3


@pytest.mark.long
def test_a_worker_that_cannot_start_ends_the_demo_with_its_last_words(platform: Platform, trace: Path) -> None:
    platform.worker("wide", cpus=4, pool="threads")
    done = platform.celery(*demo(trace))
    assert done.returncode == 1
    assert "wide ended with exit code" in done.stderr
    assert "a live worker" in done.stderr
