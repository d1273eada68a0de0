"""A recorded history is judged as the run was: each count is 1 where exactly that is wrong in the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.faults.judge import main
from tests.faults.judging import history
from tests.faults.judging.oracle import COUNTS, NOT_HELD, judge

GOOD = "succeeded"
Records = list[dict[str, Any]]


def body(what: str, job: str, at: float, **changes: Any) -> dict[str, Any]:
    named = {"job": job, "epoch": 1, "attempt": 1, "worker": "a", "incarnation": "a-1", "pid": 7}
    return {"what": what, **named, "at": at, "millicores": 1000, **changes}


def right() -> Records:
    """Return the records of two jobs, one after the other on one CPU, and of a third, refused job."""
    records: Records = [{"what": "fault", "kind": "kill a child", "at": 0.1, "until": 0.1, "worker": "a"}]
    for job, value, began in (("j1", 1, 0.0), ("j2", 2, 1.2)):
        records += [
            {"what": "submit", "job": job, "outcome": "accepted", "value": value, "expected": [GOOD], "at": began},
            body("start", job, began),
            body("end", job, began + 0.8),
            {"what": "effect", "job": job, "attempt": 1, "pid": 7},
            {"what": "row", "job": job, "state": "succeeded"},
            {
                "what": "attempt",
                "job": job,
                "epoch": 1,
                "attempt": 1,
                "outcome": "succeeded",
                "at": began + 0.9,
                "error": None,
            },
            {"what": "result", "job": job, "wanted": value, "found": ["SUCCESS", value], "unknown": False},
        ]
    refused = {"what": "submit", "job": "j3", "outcome": "refused", "value": 3, "expected": [], "at": 2.0}
    counter = {"what": "counter", "name": "admitted", "value": 2}
    return [*records, refused, {"what": "worker", "name": "a", "millicores": 1000}, counter]


def of(records: Records, what: str, job: str = "j2") -> dict[str, Any]:
    return next(record for record in records if record["what"] == what and record.get("job") == job)


def change(what: str, **changes: Any) -> Callable[[Records], None]:
    return lambda records: of(records, what).update(changes)


def drop(what: str) -> Callable[[Records], None]:
    return lambda records: records.remove(of(records, what))


def add(**record: Any) -> Callable[[Records], None]:
    return lambda records: records.append(record)


def run_again(records: Records) -> None:
    records += [body("start", "j2", 2.5, pid=8), body("end", "j2", 2.9, pid=8)]


def above_the_limit(records: Records) -> None:
    """Let both jobs run at once, on a worker with room for them, though their key allows one."""
    records += [{"what": "worker", "name": "a", "millicores": 2000}]
    of(records, "start").update(at=0.5)
    for job in ("j1", "j2"):
        of(records, "submit", job).update(limit={"customer:1": 1})


DOCTORED: list[tuple[str, Callable[[Records], None]]] = [
    ("lost", drop("row")),
    ("lost", change("row", state="running")),
    ("misjudged", change("row", state="failed")),
    ("misjudged", add(what="row", job="j3", state="succeeded")),
    ("doubled effects", add(what="effect", job="j2", attempt=1, pid=7)),
    ("doubled effects", drop("effect")),
    ("two starts", run_again),
    ("overcommit", change("start", at=0.5)),
    ("limit exceeded", above_the_limit),
    ("wrong worker", change("submit", workers=["b"])),
    ("leak", add(what="leak", text="I3: worker a has 1000 millicores allocated")),
    ("stuck", change("row", state="waiting")),
    ("taken back", lambda records: records.append({**of(records, "attempt"), "attempt": 1, "error": NOT_HELD})),
    ("wrong results", change("result", found=["SUCCESS", 1])),
    ("wrong results", change("result", found=None)),
    ("wrong results", change("result", found=["SUCCESS", None])),
    ("deaths", add(what="death", text="a (pid 7) ended with -11")),
]


def test_every_count_is_doctored_once() -> None:
    assert {name for name, _ in DOCTORED} == set(COUNTS)


@pytest.mark.parametrize(("name", "doctor"), DOCTORED)
def test_judge_counts_what_is_wrong_in_a_file(tmp_path: Path, name: str, doctor: Callable[[Records], None]) -> None:
    records = right()
    doctor(records)
    file = tmp_path / "history.jsonl"
    history.write(file, records)
    done = CliRunner().invoke(main, [str(file), "--json"])
    assert done.exit_code == 1, done.output
    assert json.loads(done.stdout)["counts"] == dict.fromkeys(COUNTS, 0) | {name: 1}
    shown = CliRunner().invoke(main, [str(file)])
    assert shown.exit_code == 1
    assert f"{name}: 1 ({COUNTS[name]})" in shown.stdout


def test_judge_finds_zeros_in_a_right_history(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "history.jsonl"
    history.write(file, right())
    assert history.read(file) == right()
    done = CliRunner().invoke(main, [str(file), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"submissions": 3, "counts": dict.fromkeys(COUNTS, 0), "found": {}}


def test_an_unknown_value_is_right_where_its_process_died() -> None:
    records = right()
    change("result", found=["SUCCESS", None], unknown=True)(records)
    assert judge(history.evidence(records)).zeros


def test_a_submission_of_unknown_outcome_counts_where_it_has_a_row() -> None:
    records = right()
    change("submit", outcome="unsure")(records)
    assert judge(history.evidence(records)).zeros
    of(records, "row").update(state="failed")
    assert judge(history.evidence(records)).counts["misjudged"] == 1
    gone = [record for record in records if record.get("job") != "j2" or record["what"] == "submit"]
    assert judge(history.evidence(gone)).zeros


@pytest.mark.parametrize("line", ["{", "[]", '{"job": "j1"}', '{"what": "start", "job": "j1"}'])
def test_judge_refuses_a_file_that_is_no_history(tmp_path: Path, line: str) -> None:
    file = tmp_path / "history.jsonl"
    file.write_text(f"{line}\n")
    done = CliRunner().invoke(main, [str(file)])
    assert done.exit_code == 1
    assert "is no history of a run" in done.output
