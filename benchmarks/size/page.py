"""The pages of a large cluster: their first load, how soon they follow a submission, and what their process uses.

A thousand simulated workers send heartbeats, each with a running job. 100,000 jobs of some hundred shapes wait. A
browser has two pages open while jobs are submitted, start and end. It shares the machine with the page's process, the
servers and the program that stands for the cluster.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import text

from benchmarks.bench import Bench
from benchmarks.books import MOST_LOSSES, Books, books
from benchmarks.servers import Pair
from benchmarks.size.scale import Scale
from benchmarks.size.stock import TASK, engine_of, settle
from celery_capacity import create_app
from celery_capacity.platform.processes.supervisor import script_command
from celery_capacity.routing.ledger.replies import Arrived, Ended
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.duties import apply_transitions, refill
from celery_capacity.workers.process.stores import platform_of

#: Workers, jobs that wait, and their shapes: from 5 CPUs up, with 1 to 6 GiB.
WORKERS: Final = 1000
WAITING: Final = 100_000
CPUS: Final = range(5, 55)
GIB: Final = range(1, 7)
#: Loads of each page, submissions that a page must follow, and seconds for which the process is watched.
LOADS: Final = 15
SUBMISSIONS: Final = 20
WATCHED: Final = 30.0
#: Milliseconds between two of these submissions, and until a page must have followed one.
PAUSE_MS: Final = 700
PATIENCE_MS: Final = 60_000
#: Pages that follow, and the element whose text changes with a submission.
PAGES: Final[Mapping[str, str]] = {"/": "#totals a.card strong", "/waiting": "#waiting-jobs"}
#: Other pages that are loaded.
OTHERS: Final = ("/?group=status", "/jobs", "/runs", "/tasks")
#: Request of the job that each worker runs.
FULL: Final = "cpus=60000,slots=1"
#: Leases that outlast the measurement, as `books` has them.
LASTING: Final = {"PLATFORM_WORKER_TTL": "3600", "PLATFORM_LOST_AFTER": "3700"}
#: Seconds in which each worker sends a heartbeat.
BEAT: Final = 30.0

_WORKERS: Final = text("""
INSERT INTO workers (incarnation, name, cpus, memory, capacity, status, hostname, pid, boot_id, version, started_at,
  seen_at)
SELECT life, name, 64000, 274877906944, '{"cpus": 64, "memory": 274877906944, "slots": 64}', 'ready', 'host', 1, 'boot',
  '0', now(), now() FROM unnest(CAST(:names AS text[]), CAST(:lives AS text[])) AS w (name, life)
""")
_RUNNING: Final = text("""
WITH j AS (
  INSERT INTO jobs (id, name, state, epoch, attempt, step, worker, incarnation, request, shape, queue, message,
    admitted_at, started_at)
  SELECT id, :task, 'running', :epoch, 1, 2, worker, life, '{"cpus": 60, "slots": 1}', :shape, 'celery', :message,
    now(), now()
  FROM unnest(CAST(:ids AS text[]), CAST(:names AS text[]), CAST(:lives AS text[])) AS r (id, worker, life)
  RETURNING id, worker, incarnation, admitted_at
)
INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation, admitted_at, started_at)
SELECT id, :epoch, 1, worker, incarnation, admitted_at, admitted_at FROM j
""")


@contextmanager
def dashboard(pair: Pair) -> Iterator[tuple[str, Any]]:
    """Yield the address and the process of a dashboard, which ends after the block."""
    import psutil

    command = script_command("dashboard", "--port", "0")
    with subprocess.Popen(command, env=pair.environment(**LASTING), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            url = process.stderr.readline().split()[-1].removesuffix("/api/v1/dashboard")
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()


def load(url: str) -> dict[str, float]:
    """Measure the longest of the median loads of the pages, and the bytes of the largest one with its files."""
    import httpx

    figures: dict[str, float] = {"page_load_ms": 0.0, "page_load_kb": 0.0}
    with httpx.Client(base_url=url, timeout=60) as client:
        for path in (*PAGES, *OTHERS):
            taken, size = [], 0
            for _ in range(LOADS):
                begin, size = time.perf_counter(), 0
                page = client.get(path)
                files = {part.split('"')[0] for part in page.text.split("/static/")[1:]}
                for answer in (page, *(client.get(f"/static/{name}") for name in files)):
                    size += answer.num_bytes_downloaded
                taken.append((time.perf_counter() - begin) * 1000)
            print(f"  {path}: {statistics.median(taken):.0f} ms, the first {taken[0]:.0f} ms, {size / 1000:.0f} kB")
            figures["page_load_ms"] = max(figures["page_load_ms"], statistics.median(taken))
            figures["page_load_kb"] = max(figures["page_load_kb"], size / 1000)
    return figures


class Cluster:
    """Simulated workers and their runner of duties, on a thread: heartbeats, ends, and what Postgres is to know."""

    def __init__(self, side: Books, app: Any, workers: int) -> None:
        self._side = side
        self._app = app
        self._stores = platform_of(app)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="cluster")
        self._jobs = {f"w{number}": str(uuid.uuid4()) for number in range(workers)}
        #: True while jobs end and others start, which pages follow as they follow a submission
        self.busy = False

    def fill(self, pair: Pair, waiting: int) -> None:
        """Have each worker run a job, and submit the jobs that wait."""
        self._side.ledger.finish_epoch(self._side.ledger.epoch)
        self._stores.ledger.epoch = self._side.ledger.epoch
        self._run_one_on_each()
        self._write_rows(pair)
        shapes = list(itertools.product(CPUS, GIB))
        for number, (cpus, memory) in enumerate(shapes):
            jobs = waiting // len(shapes) + (number < waiting % len(shapes))
            self._app.submit_many(TASK, (() for _ in range(jobs)), cpus=cpus, memory=f"{memory}GiB")
        engine = engine_of(pair.database_url)
        with engine.connect() as connection:
            settle(connection)
            self._work()
            while refill.run_once(self._app, self._stores)["marked"]:
                pass
            settle(connection)
        engine.dispose()

    def _run_one_on_each(self) -> None:
        ledger, placed = self._side.ledger, {}
        for job in self._jobs.values():
            answer = ledger.submit(job, FULL, self._side.new_job()[1], self._side.message)
            worker = str(answer.worker)
            arrived = Arrived(job, Token(ledger.epoch, answer.attempt or 0), str(uuid.uuid4()))
            incarnation = self._side.incarnation(worker)
            ledger.settle(worker, incarnation, arrived=[arrived], most_losses=MOST_LOSSES)
            placed[worker] = job
        self._jobs = placed

    def _write_rows(self, pair: Pair) -> None:
        engine = engine_of(pair.database_url)
        names = list(self._jobs)
        values: dict[str, Any] = {
            "names": names,
            "lives": [self._side.incarnation(name) for name in names],
            "task": TASK,
        }
        values |= {"ids": list(self._jobs.values()), "shape": FULL, "message": self._side.message}
        with engine.connect() as connection:
            connection.execute(_WORKERS, values)
            connection.execute(_RUNNING, {**values, "epoch": self._side.ledger.epoch})
        engine.dispose()
        self._work()

    def __enter__(self) -> Cluster:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        apply_transitions.run_once(self._app, self._stores)
        refill.run_once(self._app, self._stores)

    def _live(self) -> None:
        """Once a second: heartbeats of some workers, the end of a job if the cluster is busy, and two duties."""
        names = itertools.cycle(list(self._jobs))
        while not self._ended.wait(1.0):
            for worker in itertools.islice(names, round(len(self._jobs) / BEAT) or 1):
                if worker in self._jobs:
                    self._side.renew(worker, [self._jobs[worker]])
            if self.busy and self._jobs:
                self._end(*self._jobs.popitem())
            self._work()

    def _end(self, worker: str, job: str) -> None:
        """End the job of a worker, which thereby gets one that waits."""
        end = Ended(job, Token(self._side.ledger.epoch, 1), Outcome.SUCCEEDED)
        self._side.ledger.settle(worker, self._side.incarnation(worker), ended=[end], most_losses=MOST_LOSSES)


def followed(page: Any, selector: str, submit: Any) -> list[float]:
    """Return the milliseconds from each submission until the page shows it."""
    taken = []
    for _ in range(SUBMISSIONS):
        before = page.locator(selector).first.inner_text()
        submit()
        begin = time.perf_counter()
        page.wait_for_function(
            "([selector, text]) => document.querySelector(selector)?.innerText !== text",
            arg=[selector, before],
            timeout=PATIENCE_MS,
        )
        taken.append((time.perf_counter() - begin) * 1000)
        page.wait_for_timeout(PAUSE_MS)
    return taken


def follow(context: Any, process: Any, cluster: Cluster, submit: Any) -> dict[str, float]:
    """Measure how soon open pages follow, and what the process uses while they follow two submissions a second."""
    pages, every = [], []
    for path, place in PAGES.items():
        page = context.new_page()
        page.goto(path)
        page.wait_for_selector("#live[data-state=live]")
        taken = followed(page, place, submit)
        print(f"  {path} follows in {statistics.median(taken):.0f} ms, at most {max(taken):.0f} ms")
        every += taken
        pages.append(page)
    cluster.busy = True
    before, begin = process.cpu_times(), time.monotonic()
    while time.monotonic() < begin + WATCHED:
        submit()
        pages[0].wait_for_timeout(500)
    after, seconds = process.cpu_times(), time.monotonic() - begin
    used = after.user + after.system - before.user - before.system
    memory = process.memory_info().rss / 1e6
    figures = {"page_follow_ms": statistics.median(every), "page_follow_max_ms": max(every)}
    return {**figures, "page_cpu_percent": 100 * used / seconds, "page_memory_mb": memory}


def looked_at(bench: Bench, scale: Scale) -> dict[str, float]:
    """Measure the pages of a large cluster in a browser."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        raise RuntimeError("no Chromium on this machine: `make browser` installs it")
    workers, waiting = scale.of(WORKERS), scale.of(WAITING)
    with bench.pair() as pair, books(pair, workers) as side:
        # The program that stands for the cluster, and the page's process, use any CPU.
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        os.environ.update(pair.environment(**LASTING))
        app = create_app()
        cluster = Cluster(side, app, workers)
        cluster.fill(pair, waiting)
        with cluster, dashboard(pair) as (url, process), sync_playwright() as playwright:
            figures = load(url)
            options = ["--no-sandbox"] if os.geteuid() == 0 else []
            browser = playwright.chromium.launch(executable_path=program, args=options)
            figures |= follow(browser.new_context(base_url=url), process, cluster, lambda: app.send_task(TASK, cpus=50))
            browser.close()
        return figures
