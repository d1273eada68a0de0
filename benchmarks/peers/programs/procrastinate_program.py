"""procrastinate: jobs in Postgres; a submitting process, and a worker process with as many tasks at once as slots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import procrastinate
import psycopg

#: Address of a database of its own, and the file in which tasks note start and end.
URL, NOTES = os.environ["PEER_DATABASE"], Path("notes")

connector: Any = (procrastinate.PsycopgConnector if "worker" in sys.argv else procrastinate.SyncPsycopgConnector)(
    conninfo=URL
)
app = procrastinate.App(connector=connector)

#: Seconds for all jobs to end.
PATIENCE = 300.0


@app.task(name="noop")
async def noop() -> None:
    """Do nothing."""


@app.task(name="hold")
def hold(seconds: float) -> None:
    """Sleep, and note start and end."""
    start = time.monotonic()
    time.sleep(seconds)
    note(start)


@app.task(name="stamp")
async def stamp() -> None:
    """Do nothing, and note start and end."""
    note(time.monotonic())


def note(start: float) -> None:
    """Append start and end to the notes. A short write is never torn."""
    with NOTES.open("a") as file:
        file.write(f"{start} {time.monotonic()}\n")


def notes() -> list[tuple[float, float]]:
    """Return what was noted since the last call."""
    lines = NOTES.read_text().splitlines()
    NOTES.unlink()
    return [(float(start), float(end)) for start, end in (line.split() for line in lines)]


@contextmanager
def worker(slots: int) -> Iterator[None]:
    """Run a worker process with so many slots."""
    process = subprocess.Popen([sys.executable, __file__, "worker", str(slots)], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def wait(connection: psycopg.Connection[Any]) -> None:
    """Wait until no job is left. Raise RuntimeError if that takes too long."""
    latest = time.monotonic() + PATIENCE
    left = "SELECT EXISTS (SELECT FROM procrastinate_jobs WHERE status IN ('todo', 'doing'))"
    while (row := connection.execute(left).fetchone()) is not None and row[0]:
        if time.monotonic() > latest:
            raise RuntimeError("procrastinate did not run all jobs")
        time.sleep(0.01)


def main() -> None:
    """Measure, and print the figures; or be the worker."""
    if "worker" in sys.argv:
        app.run_worker(concurrency=int(sys.argv[2]), wait=True, install_signal_handlers=True)
        return
    work: dict[str, Any] = json.loads(Path("work.json").read_text())
    jobs, slots = work["jobs"], work["slots"]
    figures: dict[str, Any] = {}
    with app.open(), psycopg.connect(URL, autocommit=True) as connection:
        app.schema_manager.apply_schema()
        begin = time.monotonic()
        noop.batch_defer(*({} for _ in range(work["together"])))
        figures["bulk"] = work["together"] / (time.monotonic() - begin)
        connection.execute("TRUNCATE procrastinate_jobs CASCADE")
        for _ in range(jobs):
            stamp.defer()
        with worker(slots):
            wait(connection)
            stamps = notes()
            figures["drain"] = jobs / (max(end for _, end in stamps) - min(start for start, _ in stamps))
            begin = time.monotonic()
            for _ in range(jobs):
                stamp.defer()
            wait(connection)
            figures["end_to_end"] = jobs / (max(end for _, end in notes()) - begin)
        with worker(work["held_slots"]):
            for seconds in work["hold"]:
                hold.defer(seconds=seconds)
            wait(connection)
            figures["held"] = notes()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
