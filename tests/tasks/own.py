"""A project with an app of its own: `celery -A tests.tasks.own worker`."""

from __future__ import annotations

from typing import Any

from celery_capacity import create_app

app = create_app("own", task_default_priority=None, worker_max_tasks_per_child=50)
#: Schedule of the project's own, beside the platform's.
app.conf.beat_schedule = {"every moment": {"task": "tests.tasks.own.heavy", "schedule": 0.2, "args": (1,)}}
app.conf.task_routes = [{"tests.tasks.own.who": {"priority": 7}}]


@app.task(cpus=4, memory="2GiB", resources={"own": 1})
def heavy(x: int) -> int:
    return x * 2


@app.task(bind=True, resources={"own": 1})
def who(self: Any) -> str:
    return str(self.app.main)
