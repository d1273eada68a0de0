"""The history of a run: the oracle's evidence as one JSON object a line, so that it can be judged again later.

    {"what": "submit", "job": "job-0-7", "outcome": "accepted", "value": 7, "expected": ["succeeded"], "at": 81.2}
    {"what": "fault", "kind": "kill Redis, back empty", "at": 83.0, "until": 84.5, "worker": ""}
    {"what": "start", "job": "job-0-7", "epoch": 1, "attempt": 1, "worker": "a", ..., "at": 81.3, "millicores": 1000}
    {"what": "end", ...}
    {"what": "effect", "job": "job-0-7", "attempt": 1, "pid": 4711}
    {"what": "row", "job": "job-0-7", "state": "succeeded"}
    {"what": "attempt", "job": "job-0-7", "epoch": 1, "attempt": 1, "outcome": "succeeded", "at": 81.5, "error": null}
    {"what": "result", "job": "job-0-7", "wanted": 7, "found": ["SUCCESS", 7], "unknown": false}
    {"what": "worker", "name": "a", "millicores": 4000}
    {"what": "leak", "text": "I3: ..."}
    {"what": "death", "text": "b (pid 4711) ended with -11: ..."}
    {"what": "counter", "name": "taken_back", "value": 0}

Times are seconds of the machine's monotonic clock. `unknown`: the process with the value died after its job had
ended, so a result without a value is right. A submission also has its `limit` by key, such as {"key": 2}, and the
`workers` on which it may run, where it says so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from celery_capacity.routing.model.states import State
from tests.faults.judging.oracle import Ended, Evidence, Line, Token

#: A record: the JSON object in a line of a history.
Record = Mapping[str, Any]
#: Result of a succeeded job whose value nobody knows.
NO_VALUE: Final = ["SUCCESS", None]
#: States in which a job waits. No job should be in them at the end of a run.
WAITING: Final = frozenset({State.ACCEPTED, State.WAITING, State.ADMITTED, State.SCHEDULED})


def write(path: Path, records: Iterable[Record]) -> None:
    """Write a whole history or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(record)}\n" for record in records)
    fresh.replace(path)


def read(path: Path) -> list[Record]:
    """Read a history.

    Raises `ValueError` with the number of the first line that is not a record.
    """
    records: list[Record] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("what"), str):
                    raise ValueError("an object with `what` was expected")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            records.append(record)
    return records


def evidence(records: Iterable[Record]) -> Evidence:
    """Return the evidence that the oracle judges.

    A submission with an unknown outcome counts as accepted if the job has a row.
    """
    records_of: dict[str, list[Record]] = {}
    for record in records:
        records_of.setdefault(record["what"], []).append(record)
    states = {row["job"]: row["state"] for row in records_of.get("row", [])}
    expected, refused = {}, []
    limits: dict[str, dict[str, int]] = {}
    workers: dict[str, frozenset[str]] = {}
    for submission in records_of.get("submit", []):
        job, outcome = submission["job"], submission["outcome"]
        if outcome == "accepted" or (outcome == "unsure" and job in states):
            expected[job] = frozenset(submission["expected"])
            if submission.get("limit"):
                limits[job] = submission["limit"]
            if submission.get("workers"):
                workers[job] = frozenset(submission["workers"])
        elif outcome == "refused" and job in states:
            refused.append(job)
    attempts: dict[str, dict[Token, Ended]] = {}
    for attempt in records_of.get("attempt", []):
        ended = Ended(attempt["outcome"], attempt["at"], attempt["error"] or "")
        attempts.setdefault(attempt["job"], {})[attempt["epoch"], attempt["attempt"]] = ended
    lines = sorted(
        (_line(record) for what in ("start", "end") for record in records_of.get(what, [])), key=lambda line: line.at
    )
    return Evidence(
        expected=expected,
        states=states,
        attempts=attempts,
        lines=lines,
        effects=Counter(effect["job"] for effect in records_of.get("effect", [])),
        capacities={worker["name"]: worker["millicores"] for worker in records_of.get("worker", [])},
        wrong_results=_wrong_results(records_of.get("result", []), lines),
        leaks=[leak["text"] for leak in records_of.get("leak", [])],
        stuck=[f"{job} is {state}" for job, state in states.items() if state in WAITING],
        deaths=[death["text"] for death in records_of.get("death", [])],
        refused=sorted(refused),
        limits=limits,
        workers=workers,
    )


def _line(record: Record) -> Line:
    return Line(**{name: record[name] for name in Line.__slots__})


def _wrong_results(results: Iterable[Record], lines: Iterable[Line]) -> list[str]:
    ends = {line.job: line for line in lines if line.what == "end"}
    return [
        f"{result['job']}: {result['found']}, its end: {ends.get(result['job'])}"
        for result in results
        if result["found"] != ["SUCCESS", result["wanted"]] and not (result["unknown"] and result["found"] == NO_VALUE)
    ]
