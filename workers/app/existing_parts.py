"""Adopt the parts that an app already has when the platform is installed on it.

These are the tasks that are defined, and the parts that Celery keeps once they were asked for: `app.amqp`,
`app.control`, `app.Task`, the backend and the connections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from celery import Celery
from celery.local import Proxy

from celery_capacity.workers.submit.task import cover

#: Parts that Celery makes once and keeps in the app itself.
KEPT: Final = ("amqp", "control", "Task")


def unproxied(app: Any) -> Celery:
    """Return the app behind `current_app` and the like."""
    real_app: Celery = app._get_current_object() if isinstance(app, Proxy) else app
    return real_app


def make_anew(app: Celery) -> None:
    """Have the app make its parts anew, of the classes that it has now.

    Queues that were added to the former parts stay. Connections and the result backend are made again when they are
    used.
    """
    before = {name: app.__dict__.pop(name) for name in KEPT if name in app.__dict__}
    if "amqp" in before and "queues" in before["amqp"].__dict__:
        app.amqp.queues = before["amqp"].queues
    app._pool = None
    app._backend_cache = None
    app._local.backend = None


def cover_tasks(app: Celery) -> None:
    """Give the platform's task class to tasks that do not derive from `app.Task`.

    Existing tasks get it now, future tasks when they are made.
    """
    for task in app._tasks.values():
        cover(task)
    app._task_from_fun = _covering(app._task_from_fun)
    app.register_task = _covering(app.register_task)


def _covering(make: Callable[..., Any]) -> Callable[..., Any]:
    def covered(*args: Any, **options: Any) -> Any:
        return cover(make(*args, **options))

    return covered
