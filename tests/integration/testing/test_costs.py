"""The costs of a job that a change may not raise, and how they are read."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from benchmarks.books import Books
from benchmarks.costs import stored
from benchmarks.costs.checking import compare, cpu_ratio, to_store
from benchmarks.costs.lives import LIVES, commands
from benchmarks.costs.reading import Costs, Meter, Reading, cpu_seconds, thread_switches
from benchmarks.costs.report import as_json, print_table, read
from benchmarks.costs.system_calls import can_count, counted
from celery_capacity.routing.ledger.client import Ledger

#: Program whose second thread waits 20 times after a line came, and lives until its input ends.
WAITS = """
import sys, threading
begin = threading.Event()

def wait_often():
    begin.wait()
    for _ in range(20):
        threading.Event().wait(0.001)
    print("done", flush=True)
    threading.Event().wait()

threading.Thread(target=wait_often, daemon=True).start()
print("begun", flush=True)
sys.stdin.readline()
begin.set()
sys.stdin.read()
"""

#: CPU seconds that a test spends to see them counted.
SPENT = 0.05


def test_job_costs_no_more_redis_commands_than_stored(ledger: Ledger) -> None:
    """Store new figures on purpose with `make store-costs`."""
    ledger.open_epoch(1)
    ledger.finish_epoch(1)
    counts = commands(Books(ledger))
    assert counts.keys() == LIVES.keys()
    assert stored.grown("commands", counts, stored.read()["commands"]) == []


def test_cost_that_grew_by_more_than_a_tenth_is_listed() -> None:
    before = {"same": 10.0, "less": 10.0, "slightly": 10.0, "more": 10.0}
    now = {"same": 10.0, "less": 5.0, "slightly": 10.9, "more": 11.1, "new": 1.0}
    assert stored.grown("commands", now, before) == [
        "commands of more: 11.1, stored 10: 1.11 times",
        "commands of new: 1, not stored",
    ]


def test_cpu_ratio_is_the_median_of_rounds_with_its_spread() -> None:
    ours = [{"cpu_us": value} for value in (100.0, 110.0, 120.0)]
    ratio, spread = cpu_ratio(ours, [{"cpu_us": 100.0}] * 3)
    assert ratio == pytest.approx(1.1)
    assert spread == pytest.approx(0.2 / 1.1)


def test_storing_costs_keeps_those_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "stored.json"
    stored.write({"commands": {"alone": 1.23456}, "cpu_ratio": {"submit": 1.0}}, path)
    stored.write({"commands": {"alone": 2.0}}, path)
    assert stored.read(path) == {"commands": {"alone": 2.0}, "cpu_ratio": {"submit": 1.0}}


def test_cpu_time_that_was_not_judged_stays_as_stored() -> None:
    now = {"commands": {"alone": 2.0}, "cpu_ratio": {"submit": 1.2}}
    before = {"commands": {"alone": 1.0}, "cpu_ratio": {"submit": 1.0, "bulk": 0.5, "gone": 3.0}}
    assert to_store(now, before) == {"commands": {"alone": 2.0}, "cpu_ratio": {"submit": 1.2, "bulk": 0.5}}


def test_cpu_time_that_is_not_stored_fails_no_check() -> None:
    assert compare({"cpu_ratio": {"submit": 1.2}}, {}) == []
    assert compare({"cpu_ratio": {"submit": 1.2}}, {"cpu_ratio": {"submit": 1.0}}) != []


def test_cpu_seconds_count_this_process_to_the_millisecond() -> None:
    before, begin = cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() < begin + SPENT:
        pass
    spent = cpu_seconds(os.getpid()) - before
    assert SPENT <= spent <= SPENT + 0.05


def test_thread_switches_count_the_waits_of_all_threads() -> None:
    # A process of its own: here a thread of another test may end between two readings, and take its count along.
    with subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        before = thread_switches(process.pid)
        process.stdin.write(b"wait\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"done\n"
        switches = thread_switches(process.pid) - before
        process.communicate()
    assert switches >= 20


def test_costs_of_a_job_are_those_of_all_rounds(redis_client: Any) -> None:
    meter = Meter(redis_client)
    before = meter.read()
    for _ in range(6):
        redis_client.ping()
    reading = meter.read().since(before)
    assert reading.calls["ping"] == 6
    costs = Costs()
    costs.add(reading, 3)
    costs.add(Reading(), 3)
    each = costs.per_job()
    assert (each["commands"], each["scripts"]) == (1, 0)
    assert "ping 1.0" in "\n".join(costs.lines("ours"))


@pytest.mark.skipif(not can_count(), reason="perf is not installed or may not trace")
def test_system_calls_of_a_process_are_counted_by_role() -> None:
    with counted({"this": [os.getpid()]}) as counts:
        for _ in range(100):
            os.getppid()
    assert 100 <= counts["this"] < 10_000


def test_table_of_costs_divides_ours_by_each_of_the_others() -> None:
    costs = {
        "ours": {"submit": {"cpu_us": 300.0, "commands": 6.0, "scripts": 0.5}},
        "plain": {"submit": {"cpu_us": 400.0, "commands": 2.0, "scripts": 0.0}},
        "then": {"submit": {"cpu_us": 200.0}},
    }
    text = StringIO()
    print_table(costs, ["submit", "drain"], text)
    lines = [line.split() for line in text.getvalue().splitlines() if line]
    assert lines == [
        ["submit,", "per", "job", "ours", "plain", "ours/plain", "then", "ours/then"],
        ["CPU,", "µs", "300", "400", "0.75", "200", "1.5"],
        ["Redis", "commands", "6", "2", "3", "–", "–"],
        ["Redis", "scripts", "0.5", "0", "–", "–", "–"],
    ]


def test_costs_are_read_as_they_were_written(tmp_path: Path) -> None:
    costs = {"ours": {"submit": {"cpu_us": 300.0}}}
    (tmp_path / "costs.json").write_text(as_json(costs))
    assert read(tmp_path / "costs.json") == costs
