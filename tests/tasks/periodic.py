"""A project with schedules of every kind, for `-A tests.tasks.periodic`."""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.schedules import crontab, solar

from celery_capacity import install

TICK = "periodic.tick"
SCHEDULE: dict[str, dict[str, Any]] = {
    "interval": {
        "task": TICK,
        "schedule": 0.5,
        "args": ("interval",),
        "options": {"cpus": 2, "memory": "1MiB", "priority": 7},
    },
    "crontab": {"task": TICK, "schedule": crontab(minute="0"), "args": ("crontab",), "options": {"cpus": 1.5}},
    "solar": {"task": TICK, "schedule": solar("sunrise", 52.5, 13.4), "args": ("solar",)},
}

app = install(Celery("periodic", set_as_current=False))
app.conf.beat_schedule = dict(SCHEDULE)
app.conf.beat_max_loop_interval = 0.5


@app.task(name=TICK, cpus=0.5)
def tick(kind: str) -> str:
    return kind


@app.on_after_configure.connect
def add_more(sender: Any, **_: Any) -> None:
    """Add a periodic task as Celery's documentation shows it."""
    sender.add_periodic_task(0.5, tick.s("added").set(cpus=0.25), name="added")
