"""Celery's canvas on the platform: marks on the steps of a replacement, and requests of Celery's own tasks.

Each step of a replacement names the job that it stands for. Celery's own tasks that put the work of others together ask
for the resources that they need.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from celery.canvas import chunks, group

from celery_capacity.routing.model.request import CALL_OPTIONS

#: The header of a step in a replacement (`Task.replace`): the id of the replaced job. A retry keeps it.
REPLACES: Final = "capacity_replaces"


#: `subtask_type` of a composed signature -> the arguments that hold its parts.
_COMPOSED: Final = {"chain": ("tasks",), "group": ("tasks",), "chord": ("header", "body")}


def steps_of(canvas: Any) -> Iterator[Any]:
    """Yield all signatures of a canvas, at every level, each composed signature before its parts.

    A signature is a mapping, and after its way over the wire it is a plain one. Other values are left out.
    """
    if not isinstance(canvas, Mapping) or not isinstance(canvas.get("options"), Mapping):
        return
    yield canvas
    arguments = canvas.get("kwargs")
    if not isinstance(arguments, Mapping):
        return
    for name in _COMPOSED.get(str(canvas.get("subtask_type")), ()):
        inner = arguments.get(name)
        # A chord's body is one signature. Its header may be one too: a group.
        for step in [inner] if isinstance(inner, Mapping) else inner or ():
            yield from steps_of(step)


def mark(canvas: Any, job: str, nesting: int) -> None:
    """Mark all steps of a replacement with the id of the replaced job.

    Steps in the replacement of another job keep their mark: they followed the replaced task there.

    `nesting`: how often the id has been replaced. This number makes the step that carries the id on newer than the
    replaced job. All steps have it, because a step that is replaced itself counts on from there. Celery leaves it out
    inside a chord.

    A composed signature is marked only where it has headers of its own: these override the headers of its steps.
    """
    for step in steps_of(canvas):
        options = step["options"]
        headers = options.get("headers")
        composed = step.get("subtask_type") in _COMPOSED
        if not composed:
            options["replaced_task_nesting"] = max(options.get("replaced_task_nesting") or 0, nesting)
        if composed and headers is None:
            continue
        if REPLACES not in (headers or {}):
            options["headers"] = {**(headers or {}), REPLACES: job}


def mark_of(args: Any) -> dict[str, str]:
    """Return the mark of a canvas among a task's arguments, as a header; empty where there is none."""
    for canvas in args or ():
        for step in steps_of(canvas):
            headers = step["options"].get("headers")
            if isinstance(headers, Mapping) and isinstance(headers.get(REPLACES), str):
                return {REPLACES: headers[REPLACES]}
    return {}


#: Celery's task that waits for the header of a chord where the result backend does not, and publishes the body.
UNLOCKING: Final = "celery.chord_unlock"
#: Options of a chunks signature that are handed on to each of its parts.
_GIVEN: Final = (*CALL_OPTIONS, "rerun", "priority", "headers")
#: Tasks of Celery's own that put the work of others together. They compute next to nothing, and take only a slot.
#: `celery.chord_unlock` checks whether a header is done, and retries itself until it is. It holds nothing meanwhile.
COORDINATING: Final = frozenset(
    {UNLOCKING, "celery.accumulate", "celery.backend_cleanup", "celery.chord", "celery.chunks", "celery.group"}
)
#: Celery's tasks that call another task within their own job, item by item. They need what the called task needs.
CALLING: Final = frozenset({"celery.map", "celery.starmap"})


def called_by(name: str, kwargs: Any) -> tuple[str, Mapping[str, Any]] | None:
    """Return the task that a job of `CALLING` calls, with the options of its signature. None for another job."""
    if name not in CALLING or not isinstance(kwargs, Mapping):
        return None
    task = kwargs.get("task")
    if not isinstance(task, Mapping) or not isinstance(task.get("task"), str):
        return None
    options = task.get("options")
    return task["task"], options if isinstance(options, Mapping) else {}


class Chunks(chunks):
    """Celery's chunks, with their options handed on to each part. Celery's own class forgets the options."""

    def group(self) -> group:
        parts = super().group()
        options = {name: self.options[name] for name in _GIVEN if name in self.options}
        for part in parts.tasks:
            part.set(**options)
        return parts
