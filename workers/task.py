"""The platform's base for tasks: a request is declared by attributes, and what is not there yet says so."""

from __future__ import annotations

from typing import Any

from celery import Task
from celery.canvas import Signature
from kombu.utils.imports import symbol_by_name

from routing.errors import Unsupported


class PlatformTask:
    """Mixed into the app's task class. `cpus`, `memory`, `gpus`, `resources` are the declared request."""

    cpus: float | None = None
    memory: int | str | None = None
    gpus: int | None = None
    resources: dict[str, int] | None = None
    #: False: it must not start twice by itself. Its first attempt that is lost with its worker or process ends the job.
    rerun: bool = True

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
    return _in_front(found, "Task", {"abstract": True, "__module__": __name__})


def cover(task: Any) -> Any:
    """Give the platform's class to a task that does not have it: one that was made before `install`, or whose base
    derives from `celery.Task` and not from the app's. Returns it."""
    cls = type(task)
    if not issubclass(cls, PlatformTask):
        told = {name: cls.__dict__[name] for name in ("__module__", "__doc__", "__qualname__") if name in cls.__dict__}
        # (Its own class is its own alone: Celery makes one for each task.)
        task.__class__ = _in_front(cls, cls.__name__, told)
    return task


def _in_front(base: type, name: str, namespace: dict[str, Any]) -> type:
    """A class with the platform's methods before those of `base`, and what `base` declares before our defaults."""
    declared = {
        attribute: getattr(base, attribute)
        for attribute, value in vars(PlatformTask).items()
        if not attribute.startswith("__") and not callable(value) and hasattr(base, attribute)
    }
    return type(name, (PlatformTask, base), {**declared, **namespace})
