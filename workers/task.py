"""The platform's base for tasks: a request is declared by attributes, and what is not there yet says so."""

from __future__ import annotations

from typing import Any

from celery import Task
from celery.canvas import Signature
from kombu.utils.imports import symbol_by_name

from routing.errors import Unsupported


class PlatformTask:
    """Mixed into the app's task class. `cpus`, `memory`, `gpus`, `resources` are the declared request. (`rate_limit` is
    Celery's, and holds for the whole cluster.)"""

    cpus: float | None = None
    memory: int | str | None = None
    gpus: int | None = None
    resources: dict[str, int] | None = None
    #: False: it must not start twice by itself. Its first attempt that is lost with its worker or process ends the job.
    rerun: bool = True
    #: True: no two jobs with the same arguments at once. A text: none with this key.
    unique: bool | str | None = None
    #: Seconds after a submission in which an equal one is the same job though that has ended.
    unique_for: float | None = None

    def replace(self, sig: Signature) -> Any:
        """As Celery's; a replacement by a chain, a group or a chord is not supported yet, and says so."""
        if hasattr(sig, "tasks") or sig.get("subtask_type") is not None:
            raise Unsupported(
                f"Task.replace by a {sig.get('subtask_type') or 'canvas'} is not supported yet",
                advice="Replace by a single task, or send the canvas from the task and return.",
            )
        return super().replace(sig)  # type: ignore[misc]


def task_class(base: Any) -> type:
    """The app's task class with the platform's in front of it."""
    found = symbol_by_name(base) if base is not None else Task
    return type("Task", (PlatformTask, found), {"abstract": True, "__module__": __name__})
