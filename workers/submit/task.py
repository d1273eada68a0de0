"""The platform's base for tasks: attributes declare a request, and the steps of a replacement name the replaced job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from celery import Task
from celery.canvas import Signature, chunks
from celery.exceptions import Ignore
from kombu.utils.imports import symbol_by_name

from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.progress import report_meta
from celery_capacity.workers.submit.canvas import REPLACES, Chunks, mark
from celery_capacity.workers.submit.encode import PRIORITY_HEADER


class PlatformTask:
    """Mixin for the app's task class. `cpus`, `memory`, `gpus`, `resources` are the declared request.

    `rate_limit` is Celery's, and holds for the whole cluster.
    """

    cpus: float | None = None
    memory: int | str | None = None
    gpus: int | None = None
    resources: dict[str, int] | None = None
    #: Alternatives in order, such as `[{"gpus": 1}, {"cpus": 32}]`: the first that a worker has room for is taken.
    requests: Sequence[Mapping[str, Any]] | None = None
    #: Time that the job is expected to run: seconds, text such as "10m", or a timedelta.
    expected: float | str | timedelta | None = None
    #: Tenant of its jobs, None for that of the process.
    tenant: str | None = None
    #: Labels that its worker must have, such as `{"arch": "aarch64", "mem": ">=64"}`.
    where: Mapping[str, Any] | None = None
    #: Name of the only worker that may run it.
    worker: str | None = None
    #: True: it has its worker alone.
    exclusive: bool | None = None
    #: "pack": on the fullest worker that has room; "spread": on the one with the most free CPUs.
    placement: str | None = None
    #: False: the platform starts the job only once. An attempt that is lost with its worker or process ends the job.
    rerun: bool = True
    #: True: no two jobs with equal arguments at once. A text: no two jobs with this key at once.
    unique: bool | str | None = None
    #: Seconds after a submission in which an equal one is the same job, even if that job has ended.
    unique_for: float | None = None
    #: Most jobs at once by key, such as {"customer:42": 2}, or a function of the arguments that returns this.
    limit: Any = None
    #: Rates of starts by key, such as {"customer:42": "10/m"}, or a function of the arguments that returns this.
    rate: Any = None
    request: Any

    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        """Submit a call as Celery does. Calls that are alike use a template (`workers.submit.message_cache`)."""
        plain = super().apply_async  # type: ignore[misc]
        templates = getattr(self._get_app(), "platform_templates", None)  # type: ignore[attr-defined]
        if more or templates is None:
            return plain(args, kwargs, *more, **options)
        return templates.apply_async(self, plain, args, kwargs, options)

    def update_state(self, task_id: str | None = None, state: Any = None, meta: Any = None, **more: Any) -> Any:
        """Store a state as Celery does. `current` and `total` in `meta` are kept as the progress of the job, too."""
        returned = super().update_state(task_id=task_id, state=state, meta=meta, **more)  # type: ignore[misc]
        if task_id is None or task_id == self.request.id:
            report_meta(meta)
        return returned

    def signature_from_request(
        self, request: Any = None, args: Any = None, kwargs: Any = None, queue: Any = None, **options: Any
    ) -> Any:
        """Return the signature of a retry as Celery does. A priority that the task gives it is marked as such.

        Without the mark, a retry keeps the priority that an operator or its age gave the job.
        """
        sig = super().signature_from_request(request, args, kwargs, queue, **options)  # type: ignore[misc]
        if options.get("priority") is not None:
            sig.options["headers"] = {**(sig.options.get("headers") or {}), PRIORITY_HEADER: True}
        return sig

    def replace(self, sig: Signature) -> Any:
        """Replace as Celery does. Chunks are replaced by their group, which alone can carry an id on."""
        return super().replace(sig.group() if isinstance(sig, chunks) else sig)  # type: ignore[misc]

    def on_replace(self, sig: Signature) -> Any:
        """Replace as Celery does, and mark the steps of the replacement.

        The job is `replaced` until the last step of the replacement carries its id on.
        """
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
        """Return chunks like Celery's, whose options (`task.chunks(...).set(cpus=8)`) hold for each part."""
        return Chunks(self.s(), it, n, app=self.app)  # type: ignore[attr-defined]

    def add_to_chord(self, sig: Signature, lazy: bool = False) -> Any:
        """Add a signature to a chord as Celery does. In a replacement it is a step of that, too."""
        replaces = self.request.get(REPLACES)
        if replaces:
            mark(sig, replaces, self.request.replaced_task_nesting or 0)
        return super().add_to_chord(sig, lazy)  # type: ignore[misc]


def task_class(base: Any) -> type:
    """Return the app's task class with the platform's in front of it."""
    base_class = symbol_by_name(base) if base is not None else Task
    return _in_front(base_class, "Task", {"abstract": True, "__module__": __name__})


def cover(task: Any) -> Any:
    """Give the platform's class to a task that does not have it, and return the task.

    Such a task was made before `install`, or its base derives from `celery.Task` and not from the app's class.
    """
    cls = type(task)
    if not issubclass(cls, PlatformTask):
        namespace = {
            name: cls.__dict__[name] for name in ("__module__", "__doc__", "__qualname__") if name in cls.__dict__
        }
        # The task's class is its own alone: Celery makes one for each task.
        task.__class__ = _in_front(cls, cls.__name__, namespace)
    return task


def _in_front(base: type, name: str, namespace: dict[str, Any]) -> type:
    """Return a class with the platform's methods before those of `base`.

    Declarations of `base` come before our defaults.
    """
    declared = {
        attribute: getattr(base, attribute)
        for attribute, value in vars(PlatformTask).items()
        if not attribute.startswith("__") and not callable(value) and hasattr(base, attribute)
    }
    return type(name, (PlatformTask, base), {**declared, **namespace})
