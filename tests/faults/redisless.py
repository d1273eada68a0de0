"""Work goes on for an hour without the only Redis, under load and at the usual intervals.

    python -m tests.faults.redisless --minutes 60 --json summary.json

Two workers, prefork and threads, get 20 jobs a second. Redis, which is ledger, broker and result backend at once, is
ended after a while, stays away for so many minutes, and comes back empty (`--keep`: with the data of a dump). With
`--stop` it is not ended but stopped: it answers nobody, closes no connection, and goes on at last. The summary has the
seconds from its end to the first start from Postgres, the percentiles from before `delay()` to the start of the body
and of `delay()` itself while Redis was away, and the counts of the oracle, which must all be 0.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from celery_capacity.platform.embedded import valkey
from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.errors import NotAccepted, OutcomeUnknown
from tests.faults.breaking.servers import Servers, own_servers
from tests.faults.judging.oracle import read
from tests.faults.judging.watching import TASK, Oracle
from tests.fixtures.jobs.submitting import Submitter, platform_on
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.servers.pair import TENTH, empty_database
from tests.fixtures.waiting import until

#: Seconds of work before Redis ends, and after the ledger decides again.
BEFORE: Final = 20.0
AFTER: Final = 20.0
#: Seconds of a body.
BODY: Final = 0.02
#: Seconds from `delay()` to the start of a body that waited for no other.
SETTLED: Final = 0.1
#: Seconds between two lines of progress.
SAY_EVERY: Final = 30.0


class Load:
    """A thread that submits so many jobs a second and records the time that each submission takes."""

    def __init__(self, submitter: Submitter, oracle: Oracle, rate: float) -> None:
        self._submitter = submitter
        self._oracle = oracle
        self._every = 1 / rate
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        #: By job: when `delay()` was called and when it returned, in seconds of the monotonic clock.
        self.sent: dict[str, tuple[float, float]] = {}
        self.refused = 0
        self.errors: list[str] = []

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        began, number = time.monotonic(), 0
        while not self._over.wait(max(0.0, began + number * self._every - time.monotonic())):
            job, called = f"soak-{number}", time.monotonic()
            arguments = (str(self._oracle.trace), number, BODY, 1000, "")
            try:
                self._submitter.app.send_task(TASK, arguments, task_id=job, cpus=1)
            except NotAccepted:
                self.refused += 1
            except OutcomeUnknown:
                self._oracle.unsure(job, number)
            except Exception as error:
                self.errors.append(repr(error))
            else:
                self.sent[job] = (called, time.monotonic())
                self._oracle.accepted(job, number)
            number += 1


def percentile(values: Sequence[float], part: float) -> float | None:
    """Return a percentile in seconds, rounded to milliseconds, or None if there are no values."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * part))], 3) if ordered else None


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    return {"p50": percentile(values, 0.5), "p95": percentile(values, 0.95), "most": percentile(values, 1.0)}


@contextmanager
def usual_platform(servers: Servers, folder: Path, scale: float) -> Iterator[Platform]:
    """Yield a platform with one Redis for all purposes.

    `scale`: 1 leaves all intervals at their defaults, 0.1 is a tenth.
    """
    usual = {name: str(float(value) * 10 * scale) for name, value in TENTH.items()}
    usual["PLATFORM_DUE_INTERVAL"] = str(max(0.25, 1.0 * scale))
    with empty_database(servers.pair) as database_url:
        environment = {
            "REDIS_URL": servers.pair.redis_url,
            "DATABASE_URL": database_url,
            "PLATFORM_HOME": str(folder / "home"),
            "PLATFORM_IMPORTS": "tests.tasks.traced",
            **(usual if scale != 1 else {}),
        }
        with platform_on(environment, folder) as platform:
            yield platform


@contextmanager
def without_redis(servers: Servers, oracle: Oracle, stop: bool) -> Iterator[None]:
    """Keep Redis away for the block: ended, or stopped so that it answers nobody and closes no connection."""
    server = valkey.running(servers.redis_folder)
    assert server is not None
    if stop:
        os.kill(server.process.pid, signal.SIGSTOP)
    else:
        servers.kill_redis()
        oracle.results_were_lost()
    try:
        yield
    finally:
        if stop:
            os.kill(server.process.pid, signal.SIGCONT)
        else:
            servers.start_redis()


def run(
    servers: Servers, folder: Path, minutes: float, rate: float, keep: bool, stop: bool, scale: float
) -> dict[str, Any]:
    """Run once and return the summary."""
    with usual_platform(servers, folder, scale) as platform:
        submitter, oracle = Submitter(platform), Oracle(platform, folder / "trace")
        load = Load(submitter, oracle, rate)
        try:
            for name, pool in (("a", "prefork"), ("b", "threads")):
                platform.worker(name, 4, pool)  # type: ignore[arg-type]
            load.start()
            _wait("Redis is there", BEFORE * scale)
            if keep:
                with servers.admin() as admin:
                    admin.save()
            away = time.monotonic()
            with without_redis(servers, oracle, stop):
                _wait("Redis is away", minutes * 60)
                decided = _authority(platform)
            back = time.monotonic()
            oracle.whole_again("Redis was away")
            until(lambda: _authority(platform) == "ledger", "the ledger decides again", 120)
            ledger_after = time.monotonic() - back
            _wait("Redis is back", AFTER * scale)
            load.finish()
            verdict = oracle.verdict(180)
            return {
                "minutes": minutes,
                "jobs": len(load.sent),
                "refused": load.refused,
                "errors": load.errors[:5],
                "decided_while_away": decided,
                **_times(oracle, load, away, back),
                "seconds_until_the_ledger_decides": round(ledger_after, 1),
                "counts": verdict.counts,
                "found": list(verdict.lines()),
            }
        finally:
            load.finish()
            submitter.close()


def _times(oracle: Oracle, load: Load, away: float, back: float) -> dict[str, Any]:
    lines = [line for line in read(oracle.trace) if line.what == "start"]
    starts: dict[str, float] = {}
    for line in lines:
        starts.setdefault(line.job, line.at)
    epochs = sorted({line.epoch for line in lines if away < line.at < back})
    from_postgres = [line.at for line in lines if epochs and line.epoch == epochs[-1] and line.at < back]
    first = min(from_postgres, default=None)
    calls = [returned - called for called, returned in load.sent.values() if away < called < back]
    sent = {job: called for job, (called, _) in load.sent.items() if away < called < back - 1 and job in starts}
    # Jobs submitted while nobody decided are worked off first.
    settled = min((called for job, called in sent.items() if starts[job] - called < SETTLED), default=back)
    steady = [starts[job] - called for job, called in sent.items() if called >= settled]
    return {
        "first_start_after": None if first is None else round(first - away, 1),
        "backlog_worked_off_after": round(settled - away, 1),
        "starts_while_away": len(from_postgres),
        "delay_to_start": {"jobs": len(steady), **percentiles(steady)},
        "delay": percentiles(calls),
    }


def _authority(platform: Platform) -> str:
    with platform.engine.connect() as connection:
        return read_authority(connection).authority


def _wait(what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        print(f"{what}, for {left:.0f} s", file=sys.stderr, flush=True)
        time.sleep(min(SAY_EVERY, left))


@click.command(help=__doc__)
@click.option("--minutes", default=60.0, help="How long Redis is away.")
@click.option("--rate", default=20.0, help="Jobs a second.")
@click.option("--keep", is_flag=True, help="Redis comes back with the data of a dump, not empty.")
@click.option("--stop", is_flag=True, help="Redis is not ended but stopped, and answers nobody.")
@click.option("--scale", default=1.0, help="Of all intervals; 1 are the defaults.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where the summary goes as well.")
def main(minutes: float, rate: float, keep: bool, stop: bool, scale: float, path: Path | None) -> None:
    with tempfile.TemporaryDirectory(prefix="redisless-") as folder, own_servers() as servers:
        servers.forget_dump()
        summary = run(servers, Path(folder), minutes, rate, keep, stop, scale)
    written = json.dumps(summary, indent=2)
    print(written)
    if path is not None:
        path.write_text(f"{written}\n")
    sys.exit(any(summary["counts"].values()) or bool(summary["errors"]))


if __name__ == "__main__":
    main()
