"""Periodic tasks: a project's own schedules beside the platform's ticks, with the requests of their entries.

The schedules are intervals, crontab, the sun, and added ones.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from celery import Celery
from celery.beat import PersistentScheduler
from sqlalchemy import text

from tests.fixtures.processes.platforms import ENDING, Platform
from tests.fixtures.waiting import until
from tests.tasks.periodic import SCHEDULE

#: Kind of schedule -> the request and the priority of its jobs.
ASKED = {
    "interval": ({"cpus": 2, "memory": 1024**2, "slots": 1}, 7),
    "crontab": ({"cpus": 1.5, "slots": 1}, 0),
    "solar": ({"cpus": 0.5, "slots": 1}, 0),
    "added": ({"cpus": 0.25, "slots": 1}, 0),
}


def was_away(days: int, file: Path) -> None:
    """Make beat's file say that beat last ran this many days ago, so that entries by the clock are due at once."""
    app = Celery("away", set_as_current=False)
    app.conf.beat_schedule = dict(SCHEDULE)
    scheduler = PersistentScheduler(app, schedule_filename=str(file))
    for entry in scheduler.schedule.values():
        entry.last_run_at = datetime.now(UTC) - timedelta(days=days)
    scheduler.close()


def rows(platform: Platform) -> list[Any]:
    with platform.engine.connect() as connection:
        return list(connection.execute(text("SELECT id, state, request, priority FROM jobs ORDER BY seq")))


def runs(platform: Platform) -> dict[str, list[Any]]:
    """Return request and priority of the jobs that succeeded, by the kind of their schedule."""
    by_kind: dict[str, list[Any]] = {kind: [] for kind in ASKED}
    for row in rows(platform):
        if row.state == "succeeded":
            stored: Any = platform.redis.get(f"celery-task-meta-{row.id}")
            by_kind[json.loads(stored)["result"]].append((row.request, row.priority))
    return by_kind


def test_periodic_entries_of_every_kind_run_beside_the_platform_s_ticks(platform: Platform) -> None:
    platform.app = "tests.tasks.periodic"
    platform.environment.pop("PLATFORM_IMPORTS")
    was_away(2, platform.folder / "celerybeat-schedule")
    beat = platform.beat()
    for name in ("interval", "crontab", "solar", "added", "platform: heartbeat", "platform: sweep"):
        beat.wait_for(f"Sending due task {name} ")
    beat.stop()
    # All jobs were accepted before there was any worker. They run when there is one.
    sent = len(rows(platform))
    platform.worker("w", cpus=4, pool="threads")
    until(lambda: sum(map(len, runs(platform).values())) == sent, lambda: f"all have run: {rows(platform)}")
    for kind, ran in runs(platform).items():
        assert ran, kind
        assert all(run == ASKED[kind] for run in ran), kind


def test_beat_ends_well_when_term_interrupts_a_del(platform: Platform) -> None:
    beat = platform.beat("--scheduler", "tests.tasks.interrupted:InterruptedScheduler")
    assert beat.finish(ENDING) == 0, beat.tail()
