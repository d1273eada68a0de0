"""The oracle's evidence from a platform: accepted jobs, faults with their times, and the processes that should live."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil
from sqlalchemy import text

from celery_capacity.routing.errors import NotAccepted, OutcomeUnknown
from celery_capacity.routing.inspect import verify
from celery_capacity.routing.model.states import FINAL, State
from tests.faults.judging import history
from tests.faults.judging.oracle import Healing, Line, Verdict, first_start, judge, monotonic_of, read
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.waiting import PATIENCE, until
from tests.tasks.lasting import Gate
from tests.tasks.traced import TABLE

TASK: Final = "tests.tasks.traced.traced"
SUCCEEDS: Final = frozenset({"succeeded"})
#: Seconds for the result of a job that is over. The result may have waited for its store together with the outcome.
RESULT_WITHIN: Final = PATIENCE
#: Number of results that are read at once.
CHUNK: Final = 500
#: Seconds between two submissions of a flow.
FLOW_EVERY: Final = 0.03

_oracles = itertools.count()


def _is_dead(line: Line) -> bool:
    """Return True if the process that wrote this line has ended."""
    try:
        return bool(psutil.Process(line.pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def keep_commits(platform: Platform) -> None:
    """Make commits survive the end of Postgres's processes.

    Test servers write their log later, and sync nothing to disk.
    """
    with platform.engine.connect() as connection, connection.begin():
        database = connection.execute(text("SELECT current_database()")).scalar_one()
        connection.execute(text(f"ALTER DATABASE {database} SET synchronous_commit = on"))
    # Connections that were made before have the old setting.
    platform.engine.dispose()


class Oracle:
    """The oracle of a platform.

    `values`: the value that each accepted job must return.
    """

    def __init__(self, platform: Platform, trace: Path) -> None:
        self.platform = platform
        self.trace = trace
        self.values: dict[str, int] = {}
        self.healings: list[Healing] = []
        self._expected: dict[str, frozenset[str]] = {}
        self._unsure: dict[str, tuple[int, frozenset[str]]] = {}
        self._refused: set[str] = set()
        self._numbers = itertools.count()
        #: Prefix of this oracle's jobs. Several oracles may watch a platform, one after the other.
        self._prefix = f"job-{next(_oracles)}"
        self._lock = threading.Lock()
        # Processes that ended before do not concern this oracle.
        self._asked = {process.pid for process in platform.processes if not process.alive}
        self._results_from = 0.0
        self._fault_ended: tuple[str, float] | None = None
        self.errors: list[BaseException] = []
        #: Records that the last verdict was judged by.
        self.records: list[history.Record] = []
        #: Submission time of each job, by the monotonic clock.
        self._submitted: dict[str, float] = {}
        #: Limits by key, and workers that may run it, of each job that has some.
        self._asked_for: dict[str, dict[str, Any]] = {}
        with platform.engine.connect() as connection, connection.begin():
            connection.execute(text("SET LOCAL synchronous_commit = on"))
            connection.execute(text(TABLE))
        keep_commits(platform)

    # -- accepted jobs

    def send(
        self,
        submitter: Submitter,
        seconds: float | Gate = 0.1,
        cpus: float = 1,
        how: str = "",
        expected: Iterable[str] = SUCCEEDS,
        lasts: float | None = None,
        workers: Sequence[str] = (),
        **options: Any,
    ) -> str:
        """Submit a job and return its id. `lasts`: the run time that the call expects.

        `seconds`: how long its body runs, or the gate at which the body waits. `workers`: the workers on which the job
        may run, by its options; all where it is empty.

        The job is accepted when this returns. Raises the errors of `apply_async`.
        """
        with self._lock:
            number = next(self._numbers)
        job = f"{self._prefix}-{number}"
        self._submitted[job] = time.monotonic()
        if workers or options.get("limit"):
            self._asked_for[job] = {"limit": options.get("limit"), "workers": list(workers)}
        how_long = str(seconds) if isinstance(seconds, Gate) else seconds
        arguments = (str(self.trace), number, how_long, round(cpus * 1000), how)
        try:
            if lasts is not None:
                options["expected"] = lasts
            submitter.send(TASK, *arguments, cpus=cpus, task_id=job, **options)
        except NotAccepted:
            self._refused.add(job)
            raise
        except OutcomeUnknown:
            self.unsure(job, number, expected)
            raise
        self.accepted(job, number, expected)
        return job

    def sends(self, submitter: Submitter, count: int, **options: Any) -> list[str]:
        return [self.send(submitter, **options) for _ in range(count)]

    def accepted(self, job: str, value: int, expected: Iterable[str] = SUCCEEDS) -> None:
        with self._lock:
            self.values[job] = value
            self._expected[job] = frozenset(expected)

    def unsure(self, job: str, value: int, expected: Iterable[str] = SUCCEEDS) -> None:
        """Count the job as accepted if it has a row, now or later."""
        with self._lock:
            self._unsure[job] = (value, frozenset(expected))

    def expect(self, job: str, *states: str) -> None:
        """Allow more final states for this job, after an action of the test."""
        with self._lock:
            self._expected[job] |= set(states)

    @contextmanager
    def flow(self, submitter: Submitter, every: float = FLOW_EVERY, **options: Any) -> Iterator[None]:
        """Submit jobs in a thread during the block, and go on after refusals.

        Any error other than `NotAccepted` and `OutcomeUnknown` fails the test.
        """
        over = threading.Event()

        def submit() -> None:
            while not over.is_set():
                try:
                    self.send(submitter, **options)
                except (NotAccepted, OutcomeUnknown):
                    over.wait(every * 10)
                except BaseException as error:
                    self.errors.append(error)
                    return
                over.wait(every)

        thread = threading.Thread(target=submit, name="flow")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if self.errors:
            raise self.errors[0]

    # -- faults

    def asked(self, *processes: Process) -> None:
        """Allow these processes to end: the test killed them or asked them to go."""
        self._asked.update(process.pid for process in processes)

    def results_were_lost(self) -> None:
        """Forget earlier results.

        Redis was emptied, so the results of jobs that ended before are gone, as in plain Celery.
        """
        self._results_from = time.time()

    def whole_again(self, fault: str) -> None:
        """Note the end of a fault; the healing is measured from here."""
        self._fault_ended = (fault, time.monotonic())

    # -- outcomes

    def runs(self) -> int:
        """Return the number of bodies that began so far."""
        return sum(line.what == "start" for line in read(self.trace))

    def bytes_written(self) -> int:
        """Return the size of the trace, which grows while work goes on."""
        return self.trace.stat().st_size if self.trace.exists() else 0

    def ends_of(self, jobs: Sequence[str]) -> int:
        """Return the number of bodies of these jobs that came to their end so far."""
        return sum(line.what == "end" and line.job in jobs for line in read(self.trace))

    def starts_of(self, job: str) -> int:
        """Return the number of bodies of this job that began so far."""
        return sum(line.what == "start" and line.job == job for line in read(self.trace))

    def until_runs(self, count: int, within: float = 120.0) -> None:
        """Wait until so many bodies have begun since the test did."""
        until(lambda: self.runs() >= count, lambda: f"{count} bodies began, {self.runs()} did", within)

    def until_more(self, count: int, within: float = 120.0) -> None:
        """Wait until so many more bodies have begun."""
        self.until_runs(self.runs() + count, within)

    def open_jobs(self) -> list[tuple[str, str]]:
        """Return (job, state) of all accepted jobs that are not over, except for jobs without a row."""
        with self.platform.engine.connect() as connection:
            rows = connection.execute(text("SELECT id, state FROM jobs ORDER BY seq")).all()
        self._settle_unsure({row.id for row in rows})
        return [(row.id, row.state) for row in rows if row.state not in FINAL]

    def _settle_unsure(self, rows: set[str]) -> None:
        for job in [job for job in self._unsure if job in rows]:
            self.accepted(job, *self._unsure.pop(job))

    def verdict(self, within: float = 120.0, say: Callable[[str], None] | None = None) -> Verdict:
        """Wait for so many seconds at most until every row is final, and return the counts."""
        late: list[tuple[str, str]] = []
        try:
            until(lambda: not self.open_jobs(), "all are over", within)
        except AssertionError:
            late = self.open_jobs()
        self._note_healing(all_over=not late)
        patience = 0.0 if late else None
        report = verify.check(self.platform.engine, self.platform.redis, at_rest=True, patience=patience)
        rows = self._rows()
        self._settle_unsure(set(rows))
        leaks = [*report.lines(), *([] if late else self._held_keys())]
        self.records = [*self._collect(rows), *({"what": "leak", "text": line} for line in leaks)]
        return judge(history.evidence(self.records))

    def _held_keys(self) -> list[str]:
        """Return a line for each key that a job holds, or waits for, though all jobs are over."""
        with self.platform.engine.connect() as connection:
            rows = connection.execute(text("SELECT key, job, phase FROM job_keys ORDER BY key, job")).all()
        return [f"{row.key} has {row.job}, which {row.phase}" for row in rows]

    def _collect(self, rows: Mapping[str, Any]) -> Iterator[history.Record]:
        """Yield all evidence but leaks, as the lines of a history."""
        submissions = [(job, "accepted", value, self._expected[job]) for job, value in self.values.items()]
        submissions += [(job, "unsure", value, expected) for job, (value, expected) in self._unsure.items()]
        submissions += [(job, "refused", 0, frozenset()) for job in sorted(self._refused)]
        for job, outcome, value, expected in submissions:
            submission = {
                "outcome": outcome,
                "value": value,
                "expected": sorted(expected),
                "at": self._submitted.get(job),
            }
            yield {"what": "submit", "job": job, **submission, **self._asked_for.get(job, {})}
        for line in read(self.trace):
            yield {name: getattr(line, name) for name in line.__slots__}
        yield from self._effects()
        for job, row in rows.items():
            yield {"what": "row", "job": job, "state": row.state}
        yield from self._attempts()
        yield from self._results(rows)
        for name, millicores in self._capacities().items():
            yield {"what": "worker", "name": name, "millicores": millicores}
        for text_ in self._deaths():
            yield {"what": "death", "text": text_}

    def assert_zeros(self, within: float = 120.0) -> None:
        """Assert that all counts are 0."""
        verdict = self.verdict(within)
        assert verdict.zeros, "the oracle does not find all zeros:\n" + "\n".join(verdict.lines())

    def _note_healing(self, all_over: bool) -> None:
        if self._fault_ended is None:
            return
        (fault, since), self._fault_ended = self._fault_ended, None
        first = first_start(read(self.trace), since)
        self.healings.append(Healing(fault, first, time.monotonic() - since if all_over else None))

    def _rows(self) -> dict[str, Any]:
        with self.platform.engine.connect() as connection:
            query = "SELECT id, state, (extract(epoch FROM finished_at))::float8 AS finished FROM jobs"
            return {row.id: row for row in connection.execute(text(query))}

    def _attempts(self) -> Iterator[history.Record]:
        query = (
            "SELECT job_id, epoch, attempt, outcome, error, (extract(epoch FROM ended_at))::float8 AS ended "
            "FROM attempts ORDER BY job_id, epoch, attempt"
        )
        with self.platform.engine.connect() as connection:
            for row in connection.execute(text(query)):
                at = None if row.ended is None else monotonic_of(row.ended)
                named = {"job": row.job_id, "epoch": row.epoch, "attempt": row.attempt}
                yield {"what": "attempt", **named, "outcome": row.outcome, "at": at, "error": row.error}

    def _effects(self) -> Iterator[history.Record]:
        with self.platform.engine.connect() as connection:
            for row in connection.execute(text("SELECT job, attempt, pid FROM effects")):
                yield {"what": "effect", "job": row.job, "attempt": row.attempt, "pid": row.pid}

    def _capacities(self) -> dict[str, int]:
        """Return the millicores by the name of the worker."""
        with self.platform.engine.connect() as connection:
            rows = connection.execute(text("SELECT name, max(cpus) FROM workers GROUP BY name"))
            return {row[0]: row[1] for row in rows}

    def _deaths(self) -> list[str]:
        return [
            f"{process.name} (pid {process.pid}) ended with {process.process.returncode}:\n{process.tail(15)}"
            for process in self.platform.processes
            if not process.alive and process.pid not in self._asked
        ]

    def _results(self, rows: Mapping[str, Any]) -> Iterator[history.Record]:
        """Yield the results of the jobs that ended since results were last lost.

        If a process died after it had committed its effect, its job has a result without the value, which nobody knows.
        """
        ended = {line.job: line for line in read(self.trace) if line.what == "end"}
        with self.platform.engine.connect() as connection:
            query = text("SELECT incarnation FROM workers WHERE status NOT IN ('ready', 'draining')")
            over = set(connection.execute(query).scalars())
        unknown = {job for job, line in ended.items() if line.incarnation in over or _is_dead(line)}
        wanted = {
            job: self.values[job]
            for job, row in rows.items()
            if row.state == State.SUCCEEDED and job in self.values and row.finished > self._results_from
        }
        results: dict[str, Any] = {}
        end = time.monotonic() + RESULT_WITHIN
        missing = list(wanted)
        while missing:
            results |= self._found(missing)
            missing = [
                job
                for job in missing
                if results[job] != ["SUCCESS", wanted[job]]
                and not (job in unknown and results[job] == history.NO_VALUE)
            ]
            if time.monotonic() > end:
                break
            threading.Event().wait(0.1 if missing else 0.0)
        for job, value in wanted.items():
            yield {"what": "result", "job": job, "wanted": value, "found": results[job], "unknown": job in unknown}

    def _found(self, jobs: Sequence[str]) -> dict[str, Any]:
        """Return the status and value of each job's result, None where there is no result."""
        results = {}
        for start in range(0, len(jobs), CHUNK):
            chunk = jobs[start : start + CHUNK]
            for job, meta in zip(chunk, self.results_of(chunk), strict=True):
                results[job] = None if meta is None else [meta["status"], meta["result"]]
        return results

    def results_of(self, jobs: Sequence[str]) -> list[Any]:
        """Return the stored result of each job from Redis, under Celery's own keys, or None where there is none."""
        values: Any = self.platform.redis.mget([f"celery-task-meta-{job}" for job in jobs])
        return [None if value is None else json.loads(value) for value in values]
