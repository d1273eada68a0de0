"""The oracle finds each violation: each count is 1 where exactly that is wrong."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.faults.breaking.faults import WAYS
from tests.faults.judging.oracle import COUNTS, Ended, Evidence, Line, first_start, judge, read
from tests.faults.plan import EVERY, KINDS, LEASES, TOMBSTONES, matching, plan
from tests.fixtures.servers.pair import TENTH

SUCCEEDS = frozenset({"succeeded"})


def line(what: str, job: str, at: float, attempt: int = 1, worker: str = "a", pid: int = 7) -> Line:
    return Line(what, job, 1, attempt, worker, f"{worker}-life", pid, at, 1000)


def run(job: str, begin: float, end: float, attempt: int = 1, worker: str = "a", pid: int = 7) -> list[Line]:
    return [line("start", job, begin, attempt, worker, pid), line("end", job, end, attempt, worker, pid)]


def evidence(**changes: Any) -> Evidence:
    """Return the evidence of two jobs that ran one after the other on one CPU, with the changes."""
    right: dict[str, Any] = {
        "expected": {"j1": SUCCEEDS, "j2": SUCCEEDS},
        "states": {"j1": "succeeded", "j2": "succeeded"},
        "attempts": {"j1": {(1, 1): Ended("succeeded", 1.1)}, "j2": {(1, 1): Ended("succeeded", 2.1)}},
        "lines": run("j1", 0.0, 1.0) + run("j2", 1.2, 2.0),
        "effects": {"j1": 1, "j2": 1},
        "capacities": {"a": 1000},
    }
    return Evidence(**(right | changes))


def test_what_is_right_counts_nothing() -> None:
    verdict = judge(evidence())
    assert verdict.zeros
    assert verdict.counts == dict.fromkeys(COUNTS, 0)


LOST = Ended("lost", 0.5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lost", {"states": {"j1": "succeeded"}}),
        ("lost", {"states": {"j1": "succeeded", "j2": "running"}}),
        ("lost", {"lines": run("j1", 0.0, 1.0)}),
        ("lost", {"lines": [*run("j1", 0.0, 1.0), line("start", "j2", 1.2)]}),
        ("misjudged", {"states": {"j1": "succeeded", "j2": "failed"}}),
        ("misjudged", {"expected": {"j1": SUCCEEDS}}),
        (
            "misjudged",
            {
                "attempts": {
                    "j1": {(1, 1): Ended("succeeded", 1.1), (1, 2): Ended("failed", 3.0)},
                    "j2": {(1, 1): Ended("succeeded", 2.1)},
                }
            },
        ),
        ("doubled effects", {"effects": {"j1": 2, "j2": 1}}),
        ("doubled effects", {"effects": {"j1": 1}}),
        ("two starts", {"lines": run("j1", 0.0, 0.4) + run("j1", 0.5, 1.0, pid=8) + run("j2", 1.2, 2.0)}),
        ("overcommit", {"lines": run("j1", 0.0, 1.0) + run("j2", 0.8, 2.0)}),
        (
            "limit exceeded",
            {
                "lines": run("j1", 0.0, 1.0) + run("j2", 0.8, 2.0),
                "capacities": {"a": 2000},
                "limits": {"j1": {"k": 1}, "j2": {"k": 1}},
            },
        ),
        ("wrong worker", {"workers": {"j1": frozenset({"a"}), "j2": frozenset({"b"})}}),
        ("leak", {"leaks": ["I3: something is allocated"]}),
        ("stuck", {"states": {"j1": "succeeded", "j2": "waiting"}, "stuck": ["j2 is waiting"]}),
        ("wrong results", {"wrong_results": ["j1: None"]}),
        ("deaths", {"deaths": ["a ended with 1"]}),
    ],
)
def test_what_is_wrong_counts_once_and_under_its_name(name: str, changes: dict[str, Any]) -> None:
    verdict = judge(evidence(**changes))
    assert verdict.counts == dict.fromkeys(COUNTS, 0) | {name: 1}
    assert not verdict.zeros
    assert next(verdict.lines()).startswith(f"{name}: 1")


def test_an_attempt_that_lost_its_lease_takes_no_capacity() -> None:
    """The body of the stopped worker goes on beside the attempt that replaced it."""
    attempts = {"j1": {(1, 1): LOST, (1, 2): Ended("succeeded", 2.1)}, "j2": {(1, 1): Ended("succeeded", 3.1)}}
    lines = [*run("j1", 0.0, 3.0, 1), *run("j1", 0.6, 2.0, 2, pid=8), *run("j2", 2.2, 3.0, pid=9)]
    assert judge(evidence(attempts=attempts, lines=lines)).zeros
    # If the first attempt had kept its lease, the two would have been too many.
    open_lease = attempts | {"j1": {(1, 1): Ended("lost", 2.5), (1, 2): Ended("succeeded", 2.6)}}
    assert judge(evidence(attempts=open_lease, lines=lines)).counts["overcommit"] == 1


def test_a_poison_is_right_to_be_lost() -> None:
    poison = evidence(
        expected={"j1": SUCCEEDS, "j2": frozenset({"lost"})},
        states={"j1": "succeeded", "j2": "lost"},
        attempts={"j1": {(1, 1): Ended("succeeded", 1.1)}, "j2": {(1, 1): Ended("lost", 2.0)}},
        lines=[*run("j1", 0.0, 1.0), line("start", "j2", 1.2)],
        effects={"j1": 1},
    )
    assert judge(poison).zeros


def test_the_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    assert read(trace) == []
    lines = run("j1", 1.0, 2.0, pid=os.getpid())
    trace.write_text(
        "".join(json.dumps({name: getattr(entry, name) for name in entry.__slots__}) + "\n" for entry in lines)
    )
    assert read(trace) == lines
    assert first_start(lines, 0.5) == 0.5
    assert first_start(lines, 1.5) is None


def test_a_seed_chooses_the_same_faults_each_time_and_another_one_others() -> None:
    assert plan(1, 480.0) == plan(1, 480.0) != plan(2, 480.0)


def test_every_kind_of_fault_has_a_way() -> None:
    assert {kind.name for kind in KINDS} <= set(WAYS)


def test_faults_that_last_outlast_each_lease_and_tombstone() -> None:
    assert 1.5 * float(TENTH["PLATFORM_TOMBSTONE"]) <= TOMBSTONES
    assert 1.5 * max(float(TENTH["PLATFORM_LOST_AFTER"]), float(TENTH["PLATFORM_WORKER_TTL"])) <= LEASES


def test_kinds_are_chosen_by_words() -> None:
    assert matching("stalled-postgres") == ["Postgres is stalled"]
    assert matching("empty Redis") == ["empty Redis"]
    with pytest.raises(ValueError, match="no kind of fault"):
        matching("earthquake")
    only = plan(3, 60.0, matching("stalled-postgres"))
    assert {fault.kind for fault in only} == {"Postgres is stalled"}
    # Each fault ends before the next begins.
    assert all(earlier.until < later.at for earlier, later in pairwise(only))


@pytest.mark.parametrize("seed", range(5))
def test_a_run_of_eight_minutes_has_every_kind_of_fault_and_two_at_once(seed: int) -> None:
    faults = plan(seed, 480.0)
    assert {fault.kind for fault in faults} == {kind.name for kind in KINDS}
    moments = sorted({fault.at for fault in faults})
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    # At a moment everything may be broken already.
    assert min(gaps) >= EVERY[0]
    assert sum(gaps) / len(gaps) < EVERY[1]
    assert len(faults) - len(moments) > len(moments) / 6
    assert all(fault.at < 240.0 for fault in faults if fault.kind == "kill beat")
    busy: dict[str, float] = {}
    kinds = {kind.name: kind for kind in KINDS}
    for fault in faults:
        kind = kinds[fault.kind]
        targets = (fault.worker or kind.touches, *kind.also)
        assert all(busy.get(target, 0.0) <= fault.at for target in targets)
        busy |= dict.fromkeys(targets, fault.until)
