"""A project as it was before the platform, with its own classes for all parts that Celery lets one replace.

`make(when)` installs the platform before the project's tasks are defined, or after they were used. `app` is the app of
`-A tests.tasks.adopted`. `INSTALLED` in the environment is the `when`.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, Task, shared_task
from celery.app.amqp import AMQP
from celery.app.control import Control
from celery.worker import consumer as celery_consumer
from celery.worker import request as celery_request
from celery.worker import strategy as celery_strategy

from celery_capacity import install


class OwnRequest(celery_request.Request):
    """A request that tells the body that it was there."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._request_dict["own_request"] = True


def own_strategy(task: Any, app: Any, consumer: Any, **options: Any) -> Any:
    """Wrap Celery's strategy, and mark the messages that it handles."""
    handle = celery_strategy.default(task, app, consumer, **options)

    def handle_and_tell(message: Any, body: Any, *more: Any, **given: Any) -> Any:
        message.headers["own_strategy"] = True
        return handle(message, body, *more, **given)

    return handle_and_tell


class OwnTask(Task):
    """The project's base class, whose declarations are for all tasks."""

    abstract = True
    cpus = 0.5
    Request = OwnRequest
    Strategy = "tests.tasks.adopted:own_strategy"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        value = super().__call__(*args, **kwargs)
        seen = ["own_task", *(name for name in ("own_request", "own_strategy") if getattr(self.request, name, None))]
        return [*seen, *(["own_consumer"] if OwnConsumer.made else []), value]


class OwnAMQP(AMQP):
    """An AMQP that writes a header of its own."""

    def as_task_v2(self, *args: Any, **options: Any) -> Any:
        message = super().as_task_v2(*args, **options)
        message.headers["own_amqp"] = True
        return message


class OwnControl(Control):
    """A control with one more command."""

    def own(self) -> str:
        return "own_control"


class OwnConsumer(celery_consumer.Consumer):
    """A consumer that notes that it was made."""

    made = False

    def __init__(self, *args: Any, **options: Any) -> None:
        OwnConsumer.made = True
        super().__init__(*args, **options)


@shared_task(name="adopted.shared", cpus=0.25)
def shared() -> str:
    return "shared"


@shared_task(name="adopted.apart", base=Task, cpus=0.75, memory="1MiB", rerun=False, bind=True)
def apart(self: Any) -> str:
    """Run as a task of Celery's own class, whatever the app's class is."""
    return f"own_amqp {self.request.get('own_amqp', False)}"


class ByClass(Task):
    """A task as a class."""

    name = "adopted.by_class"
    cpus = 1.5

    def run(self) -> str:
        return "by class"


def make(when: str) -> Celery:
    """Return the project's app.

    `when`: "first", or "last", after its tasks and the app's parts were used.
    """
    app = Celery("adopted", task_cls=OwnTask, amqp=OwnAMQP, control=OwnControl, set_as_current=False)
    app.conf.worker_consumer = OwnConsumer
    if when == "first":
        install(app)

    @app.task(name="adopted.inherits", shared=False)
    def inherits() -> str:
        return "inherits"

    @app.task(name="adopted.declares", shared=False, cpus=1)
    def declares() -> str:
        return "declares"

    app.register_task(ByClass())
    if when == "last":
        assert inherits.name and app.finalized and app.amqp.router and app.control.own() and app.Task
        install(app)

    @app.task(name="adopted.later", shared=False, base=Task, cpus=0.125)
    def later() -> str:
        return "later"

    return install(app)


app = make(os.environ["INSTALLED"]) if "INSTALLED" in os.environ else None
