"""What the platform knows of Celery's canvas: the steps of a replacement say which job they stand for, and the tasks of
Celery's own that put the work of others together ask for what they need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from celery.canvas import chunks, group

from celery_capacity.routing.model.request import REQUEST_OPTIONS

#: The header of a step in a replacement (`Task.replace`): the id of the replaced job. A retry keeps it.
REPLACES: Final = "capacity_replaces"


#: Signatures that are made of others, by their `subtask_type` -> where in their arguments these stand.
_COMPOSED: Final = {"chain": ("tasks",), "group": ("tasks",), "chord": ("header", "body")}


def steps_of(canvas: Any) -> Iterator[Any]:
    """All signatures of a canvas, at every level; those that are made of others come before them. (A signature is a
    mapping, and one that came over the wire is nothing else. What is none is left out.)"""
    if not isinstance(canvas, Mapping) or not isinstance(canvas.get("options"), Mapping):
        return
    yield canvas
    arguments = canvas.get("kwargs")
    if not isinstance(arguments, Mapping):
        return
    for place in _COMPOSED.get(str(canvas.get("subtask_type")), ()):
        inner = arguments.get(place)
        # (A body is one signature, and so may a header be: a group.)
        for step in [inner] if isinstance(inner, Mapping) else inner or ():
            yield from steps_of(step)


def mark(canvas: Any, job: str, nesting: int) -> None:
    """Have all steps of a replacement say so, but for those that are in the replacement of another job already (what
    followed the replaced task there).

    `nesting`: how often the id has been replaced, by which the step that carries it on is known as newer. All steps
    have it, since those that are replaced themselves count on from there; Celery leaves it out inside of a chord.

    What is made of others says so only where it has headers of its own: these stand over those of its steps.
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
    """The mark that a canvas among a task's arguments has, as a header; empty where there is none."""
    for canvas in args or ():
        for step in steps_of(canvas):
            headers = step["options"].get("headers")
            if isinstance(headers, Mapping) and isinstance(headers.get(REPLACES), str):
                return {REPLACES: headers[REPLACES]}
    return {}


#: Celery's task that waits for the header of a chord where the result backend does not, and publishes the body.
UNLOCKING: Final = "celery.chord_unlock"
#: What a signature may be given for the jobs that are made of it.
_GIVEN: Final = (*REQUEST_OPTIONS, "rerun", "priority", "headers")
#: Tasks of Celery's own that put the work of others together: they compute next to nothing, and take a slot alone.
#: (`celery.chord_unlock` looks whether a header is done, and retries itself until it is: it holds nothing meanwhile.)
COORDINATING: Final = frozenset(
    {UNLOCKING, "celery.accumulate", "celery.backend_cleanup", "celery.chord", "celery.chunks", "celery.group"}
)
#: Those that call another task within their own job, item by item: they need what that one needs.
CALLING: Final = frozenset({"celery.map", "celery.starmap"})


def called_by(name: str, kwargs: Any) -> tuple[str, Mapping[str, Any]] | None:
    """The task that a job of `CALLING` calls, with the options of its signature; None where this is no such job."""
    if name not in CALLING or not isinstance(kwargs, Mapping):
        return None
    task = kwargs.get("task")
    if not isinstance(task, Mapping) or not isinstance(task.get("task"), str):
        return None
    options = task.get("options")
    return task["task"], options if isinstance(options, Mapping) else {}


class Chunks(chunks):
    """Celery's chunks, which forget what they are given: here each part asks for it."""

    def group(self) -> group:
        parts = super().group()
        given = {name: self.options[name] for name in _GIVEN if name in self.options}
        for part in parts.tasks:
            part.set(**given)
        return parts
