"""The platform's base for tasks: a request is declared by attributes, and a replaced job is known as such."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from celery import Task
from celery.canvas import Signature, chunks
from celery.exceptions import Ignore
from kombu.utils.imports import symbol_by_name

from workers import attempts
from workers.canvas import REPLACES, Chunks, mark


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
    request: Any

    def replace(self, sig: Signature) -> Any:
        """As Celery's. (Chunks are the group that they are made into, which alone can carry an id on.)"""
        return super().replace(sig.group() if isinstance(sig, chunks) else sig)  # type: ignore[misc]

    def on_replace(self, sig: Signature) -> Any:
        """As Celery's; the job is `replaced` until the last step of the replacement carries its id on."""
        attempt = attempts.current()
        if attempt is None or self.request.is_eager:
            return super().on_replace(sig)  # type: ignore[misc]
        mark(sig, self.request.id, (self.request.replaced_task_nesting or 0) + 1)
        try:
            return super().on_replace(sig)  # type: ignore[misc]
        except Ignore:
            attempt.outbox.replaced = True
            raise

    def chunks(self, it: Iterable[Any], n: int) -> Chunks:
        """As Celery's; what they are given (`task.chunks(...).set(cpus=8)`) holds for each part."""
        return Chunks(self.s(), it, n, app=self.app)  # type: ignore[attr-defined]

    def add_to_chord(self, sig: Signature, lazy: bool = False) -> Any:
        """As Celery's; what is added to a chord in a replacement is a step of that, too."""
        replaces = self.request.get(REPLACES)
        if replaces:
            mark(sig, replaces, self.request.replaced_task_nesting or 0)
        return super().add_to_chord(sig, lazy)  # type: ignore[misc]


def task_class(base: Any) -> type:
    """The app's task class with the platform's in front of it."""
    found = symbol_by_name(base) if base is not None else Task
    return type("Task", (PlatformTask, found), {"abstract": True, "__module__": __name__})
