"""Files of the commands that replay or simulate a trace: the trace itself, and the log."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from celery_capacity.platform.demo import trace
from celery_capacity.platform.demo.replay import Replayed
from celery_capacity.platform.processes.launch import WorkerSpec
from celery_capacity.routing.errors import InvalidRequest


def read_trace(path: Path, scale: float | None, workers: tuple[WorkerSpec, ...]) -> Replayed:
    """Read a trace for a replay on these workers. Raise InvalidRequest for an unreadable file or too wide a job."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        try:
            jobs = tuple(trace.read(lines))
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"{path} is not UTF-8 text: {error.reason} at byte {error.start}",
                value=str(path),
                advice="A trace is CSV text.",
            ) from error
    if refused := trace.too_wide(jobs, {spec.name: spec.cpus for spec in workers}):
        raise refused
    total = sum(spec.cpus for spec in workers)
    return Replayed(path.stem, jobs, scale or trace.default_scale(jobs, total), workers)


def write_log(path: Path, rows: Iterable[tuple[int, str, str, str]]) -> None:
    """Write the rows of a log under its header."""
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("job", "start", "end", "worker"))
            writer.writerows(rows)
    except OSError as error:
        raise InvalidRequest(f"--log {path} cannot be written: {error.strerror}", value=str(path)) from error
