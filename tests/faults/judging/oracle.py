"""The oracle of the fault tests: it compares the bodies that really ran with the platform's account.

    oracle = Oracle(platform, tmp_path / "trace")
    jobs = oracle.send(submitter, range(20), seconds=0.1)
    ... something breaks, and is whole again ...
    oracle.assert_zeros(within=60.0)

The oracle sees a black box: the trace that bodies left in a file, their effects, the rows, the results and the
processes. `judge` is pure. It counts each of COUNTS with the jobs concerned, and every count must be 0.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from celery_capacity.routing.model.states import FINAL

#: Names of the counts and their meanings.
COUNTS: Final = {
    "lost": "accepted, and not ended or ended without that a body ran to its end",
    "misjudged": "ended in a state that what ran does not explain, or not with exactly one recorded end",
    "doubled effects": "more than one effect of a job, or a succeeded one without its effect",
    "two starts": "one attempt of a job started twice",
    "overcommit": "attempts that held their lease ran at once above the capacity of their worker",
    "limit exceeded": "more bodies of a key ran at once than its limit, by attempts that held their lease",
    "wrong worker": "a body started on a worker that its job did not ask for",
    "leak": "at rest Redis and Postgres differ, or something is still allocated",
    "stuck": "waits although it fits",
    "taken back": "a live worker lost a job by its own heartbeat, though its body ran to its end",
    "wrong results": "a succeeded job whose result is missing or another",
    "deaths": "processes that ended unasked",
}
#: Error of an attempt that a heartbeat took back (lua/workers/renew.lua).
NOT_HELD: Final = "the worker no longer held it"
#: Seconds by which a time read from Postgres may be late. Postgres has milliseconds by the ledger's clock.
CLOCKS: Final = 0.05


#: Token of an attempt: (epoch, attempt).
Token = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the trace.

    `at`: seconds of the machine's monotonic clock.
    """

    what: str
    job: str
    epoch: int
    attempt: int
    worker: str
    incarnation: str
    pid: int
    at: float
    millicores: int

    @property
    def token(self) -> Token:
        return self.epoch, self.attempt


def shown(token: Token) -> str:
    return f"{token[0]}.{token[1]}"


def read(trace: Path) -> list[Line]:
    """Return the lines of the trace so far, in the order in which they were written."""
    if not trace.exists():
        return []
    # A line that is being written may be seen in part.
    text, _, _ = trace.read_text().rpartition("\n")
    return [Line(**json.loads(line)) for line in text.splitlines()]


@dataclass(frozen=True, slots=True)
class Run:
    """A body that began.

    `ended` is None if the body did not come to its end.
    """

    start: Line
    ended: float | None


def runs_of(lines: Iterable[Line]) -> list[Run]:
    """Pair the starts with the ends of the same process.

    Threads need no distinction: a job and an attempt in a process are one body.
    """
    open_runs: dict[tuple[str, Token, int], Line] = {}
    runs = []
    for line in lines:
        key = (line.job, line.token, line.pid)
        if line.what == "start":
            if key in open_runs:
                runs.append(Run(open_runs.pop(key), None))
            open_runs[key] = line
        else:
            runs.append(Run(open_runs.pop(key), line.at))
    return runs + [Run(line, None) for line in open_runs.values()]


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of an attempt according to its row.

    `at`: seconds of the machine's monotonic clock, None while the attempt is open.
    """

    outcome: str | None
    at: float | None
    error: str = ""


@dataclass
class Evidence:
    """The evidence that the oracle judges.

    `expected`: each accepted job with the final states that are right for it.
    """

    expected: Mapping[str, frozenset[str]]
    states: Mapping[str, str]
    attempts: Mapping[str, Mapping[Token, Ended]]
    lines: Sequence[Line]
    effects: Mapping[str, int]
    capacities: Mapping[str, int]
    wrong_results: Sequence[str] = ()
    leaks: Sequence[str] = ()
    stuck: Sequence[str] = ()
    deaths: Sequence[str] = ()
    #: Refused jobs, by the submitter's account, that have a row all the same.
    refused: Sequence[str] = ()
    #: Limits by key of each job that has some: key and number of jobs at once.
    limits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    #: Workers on which a job may run, for each job that says so.
    workers: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass
class Verdict:
    """The counts, and the jobs concerned for each."""

    found: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in COUNTS})

    @property
    def zeros(self) -> bool:
        return not any(self.found.values())

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(lines) for name, lines in self.found.items()}

    def lines(self, most: int = 8) -> Iterator[str]:
        for name, lines in self.found.items():
            if lines:
                yield f"{name}: {len(lines)} ({COUNTS[name]})"
                yield from (f"    {line}" for line in lines[:most])


def judge(evidence: Evidence) -> Verdict:
    """Count the violations.

    A stuck job is not counted as lost once more.
    """
    verdict = Verdict()
    runs = runs_of(evidence.lines)
    done: dict[str, list[Token]] = defaultdict(list)
    for run in runs:
        if run.ended is not None:
            done[run.start.job].append(run.start.token)
    stuck = {line.partition(" ")[0] for line in evidence.stuck}
    for job, expected in evidence.expected.items():
        _judge_job(verdict, evidence, job, expected, done.get(job, []), job in stuck)
    strangers = {run.start.job for run in runs} - evidence.expected.keys()
    verdict.found["misjudged"] += [f"{job} ran and was never accepted" for job in sorted(strangers)]
    verdict.found["misjudged"] += [f"{job} was refused and has a row" for job in evidence.refused]
    starts = Counter((run.start.job, run.start.token) for run in runs)
    for (job, token), times in starts.items():
        if times > 1:
            who = [f"pid {run.start.pid} of {run.start.worker}" for run in runs if run.start.job == job]
            verdict.found["two starts"].append(f"{job} attempt {shown(token)}: {times} times ({', '.join(who)})")
    verdict.found["overcommit"] += _overcommit(evidence, runs)
    verdict.found["limit exceeded"] += _limits_exceeded(evidence, runs)
    verdict.found["wrong worker"] += _wrong_workers(evidence, runs)
    for job, attempts in evidence.attempts.items():
        taken = [token for token, ended in attempts.items() if ended.error == NOT_HELD and token in done.get(job, [])]
        verdict.found["taken back"] += [f"{job} attempt {shown(token)}" for token in taken]
    verdict.found["leak"] += evidence.leaks
    verdict.found["stuck"] += evidence.stuck
    verdict.found["wrong results"] += evidence.wrong_results
    verdict.found["deaths"] += evidence.deaths
    return verdict


def _judge_job(
    verdict: Verdict, evidence: Evidence, job: str, expected: frozenset[str], done: list[Token], stuck: bool
) -> None:
    state = evidence.states.get(job)
    ends = [token for token, ended in evidence.attempts.get(job, {}).items() if ended.outcome in FINAL - {"lost"}]
    effects = evidence.effects.get(job, 0)
    if effects > 1:
        verdict.found["doubled effects"].append(f"{job}: {effects}")
    if state is None:
        verdict.found["lost"].append(f"{job} has no row")
        return
    if state not in FINAL:
        if not stuck:
            verdict.found["lost"].append(f"{job} is {state}")
        return
    if state not in expected:
        bodies = ", ".join(map(shown, done)) or "none"
        verdict.found["misjudged"].append(f"{job} is {state}; bodies that ran to their end: {bodies}")
    if state == "succeeded":
        if not done:
            verdict.found["lost"].append(f"{job} succeeded and no body ran to its end")
        if effects == 0:
            verdict.found["doubled effects"].append(f"{job}: succeeded, and has no effect")
    if state in ("succeeded", "failed") and len(ends) != 1:
        verdict.found["misjudged"].append(f"{job} is {state} and has ends at: {', '.join(map(shown, ends))}")


def _is_later_life(line: Line, start: Line) -> bool:
    return line.worker == start.worker and line.incarnation != start.incarnation and line.at > start.at


def _held(evidence: Evidence, runs: Sequence[Run]) -> Iterator[tuple[Line, float, float]]:
    """Yield the start of each run, and the times from and to which its attempt held the lease while it ran.

    A run that neither ended nor lost its lease lasts to the last line.
    """
    last = max((line.at for line in evidence.lines), default=0.0)
    for run in runs:
        start = run.start
        begin, end = start.at, run.ended
        if end is None:
            # The process died, at the latest before the next life of its worker began to work.
            lives = [line.at for line in evidence.lines if _is_later_life(line, start)]
            end = min(lives, default=last)
        ended = evidence.attempts.get(start.job, {}).get(start.token)
        if ended is not None and ended.at is not None:
            end = min(end, ended.at - CLOCKS if run.ended is None or ended.at < run.ended else end)
        if end > begin:
            yield start, begin, end


#: A change of what is taken up: its moment, its amount, and the run that makes it.
Change = tuple[float, int, str]


def _peak(changes: Iterable[Change]) -> tuple[int, set[str]]:
    """Return the largest amount that is taken up at once, and the runs that take it up then."""
    now, most, running, peak = 0, 0, set[str](), set[str]()
    # Of changes at the same moment, ends come first.
    for _, change, name in sorted(changes, key=lambda change: (change[0], change[1])):
        now += change
        (running.add if change > 0 else running.discard)(name)
        if now > most:
            most, peak = now, set(running)
    return most, peak


def _overcommit(evidence: Evidence, runs: Sequence[Run]) -> list[str]:
    """Return the workers on which attempts that held their lease ran above the capacity."""
    changes: dict[str, list[Change]] = defaultdict(list)
    for start, begin, end in _held(evidence, runs):
        name = f"{start.job} {shown(start.token)}"
        changes[start.worker] += [(begin, start.millicores, name), (end, -start.millicores, name)]
    violations = []
    for worker, moments in changes.items():
        most, peak = _peak(moments)
        capacity = evidence.capacities.get(worker)
        if capacity is not None and most > capacity:
            violations.append(f"{worker}: {most} of {capacity} millicores ({', '.join(sorted(peak))})")
    return violations


def _limits_exceeded(evidence: Evidence, runs: Sequence[Run]) -> list[str]:
    """Return the keys of which more jobs ran at once, by attempts that held their lease, than the limit allows."""
    changes: dict[tuple[str, int], list[Change]] = defaultdict(list)
    limited = [run for run in runs if run.start.job in evidence.limits]
    for start, begin, end in _held(evidence, limited):
        name = f"{start.job} {shown(start.token)}"
        for key, most in evidence.limits[start.job].items():
            changes[key, most] += [(begin, 1, name), (end, -1, name)]
    violations = []
    for (key, most), moments in changes.items():
        number, peak = _peak(moments)
        if number > most:
            violations.append(f"{key}: {number} at once, the limit is {most} ({', '.join(sorted(peak))})")
    return violations


def _wrong_workers(evidence: Evidence, runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        allowed = evidence.workers.get(run.start.job)
        if allowed is not None and run.start.worker not in allowed:
            yield f"{run.start.job} {shown(run.start.token)} ran on {run.start.worker}, not on {sorted(allowed)}"


@dataclass
class Healing:
    """Seconds from the end of a fault: to the first start of a body, and until all accepted jobs are over."""

    fault: str
    first: float | None
    all: float | None

    def __str__(self) -> str:
        first = "-" if self.first is None else f"{self.first:.1f} s"
        all_ = "-" if self.all is None else f"{self.all:.1f} s"
        return f"{self.fault}: first admission after {first}, all over after {all_}"


def first_start(lines: Iterable[Line], after: float) -> float | None:
    """Return the seconds from a moment of the monotonic clock to the first start of a body after it."""
    first = min((line.at for line in lines if line.what == "start" and line.at > after), default=None)
    return None if first is None else first - after


def monotonic_of(seconds_since_1970: float) -> float:
    """Convert a time of the wall clock to the machine's monotonic clock."""
    return seconds_since_1970 - time.time() + time.monotonic()


def decoded(value: Any) -> Any:
    """Decode the value that the result backend stores under a task's key."""
    return None if value is None else json.loads(value)
