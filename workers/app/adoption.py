"""What an app already has when the platform is installed on it: tasks that are defined, and what Celery keeps once it
was asked for (`app.amqp`, `app.control`, `app.Task`, its backend and connections)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from celery import Celery
from celery.local import Proxy

from celery_capacity.workers.submit.task import cover

#: What Celery makes once and keeps in the app itself.
KEPT: Final = ("amqp", "control", "Task")


def unproxied(app: Any) -> Celery:
    """The app behind `current_app` and the like."""
    found: Celery = app._get_current_object() if isinstance(app, Proxy) else app
    return found


def make_anew(app: Celery) -> None:
    """Have the app make its parts anew, of the classes that it has now. Queues that were added to those of before
    stay; connections and the result backend are made again when they are used."""
    before = {name: app.__dict__.pop(name) for name in KEPT if name in app.__dict__}
    if "amqp" in before and "queues" in before["amqp"].__dict__:
        app.amqp.queues = before["amqp"].queues
    app._pool = None
    app._backend_cache = None
    app._local.backend = None


def cover_tasks(app: Celery) -> None:
    """Give the platform's task class to those tasks that do not come of `app.Task`: the ones that are there, and
    those that are still to come."""
    for task in app._tasks.values():
        cover(task)
    app._task_from_fun = _covering(app._task_from_fun)
    app.register_task = _covering(app.register_task)


def _covering(make: Callable[..., Any]) -> Callable[..., Any]:
    def covered(*args: Any, **options: Any) -> Any:
        return cover(make(*args, **options))

    return covered
