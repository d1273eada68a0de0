"""`app.submit_many`: a million jobs of one task, as cheap as their messages can be made.

The first job goes through all of Celery's code, as `apply_async` does. The outcome of that (routes, headers, times, the
request) holds for all other jobs, unless something looks at each call. That is a router, a task class or an app with
code of its own, or an option that is not known here. Then each job goes through all of Celery's code.

Where nobody listens to Celery's signals, and the messages differ in the ids and the arguments alone, a template of the
first message makes the others (`workers.submit.message_cache`). This takes a quarter of the time. Else Celery makes
each message, and its signals are sent for each.

Ids are made here: a random part for all jobs, and a number for each. So a handle of a million jobs is a few bytes, and
their rows and keys stand beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Final, overload

from celery import Celery, Task
from celery.app import task as celery_task
from celery.result import AsyncResult
from kombu.utils.uuid import uuid

from celery_capacity.routing.errors import InvalidRequest, show
from celery_capacity.routing.insert.bulk import CHUNK
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.request import CALL_OPTIONS
from celery_capacity.workers.display.progress_bar import ProgressBar
from celery_capacity.workers.process import attempts
from celery_capacity.workers.submit import task as platform_task
from celery_capacity.workers.submit.chunk_writer import ChunkWriter
from celery_capacity.workers.submit.groups import Gathering, active, stored_together
from celery_capacity.workers.submit.message_cache import is_of, listens, sends_plainly
from celery_capacity.workers.submit.router import Router
from celery_capacity.workers.submit.task import PlatformTask
from celery_capacity.workers.submit.validation import is_unique

#: Characters of an id that all jobs of a call have in common, and how many numbers the rest can show.
_COMMON: Final = 28
MAX_NUMBERS: Final = 16 ** (36 - _COMMON)
#: Jobs of one chunk at the most. Three chunks are in memory.
MAX_IN_CHUNK: Final = 100_000
#: Options of a call that mean the same for each of its jobs.
_SAME_FOR_ALL: Final = frozenset(
    {
        *CALL_OPTIONS,
        "rerun",
        "priority",
        "countdown",
        "eta",
        "expires",
        "time_limit",
        "soft_time_limit",
        "ignore_result",
        "serializer",
        "compression",
        "headers",
        "link",
        "link_error",
        "retry",
        "retry_policy",
        "shadow",
    }
)
#: Options that belong to one job, or to Celery's canvas.
_OPTIONS_OF_ONE: Final = frozenset(
    {"task_id", "group_id", "group_index", "chord", "chain", "producer", "connection", "unique", "unique_for"}
)


@dataclass(frozen=True, slots=True)
class JobRange(Sequence["AsyncResult[Any]"]):
    """Jobs that were submitted together, in their order: a sequence of their results.

    A result is made when it is asked for. The sequence keeps two values, however many jobs there are.
    """

    app: Celery
    #: First characters, which all ids have in common.
    common: str
    #: Number of jobs.
    length: int

    def id(self, number: int) -> str:
        """Return the id of a job by its number, from 0."""
        return f"{self.common}{number:08x}"

    def ids(self) -> Iterator[str]:
        return map(self.id, range(self.length))

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, number: int) -> AsyncResult[Any]: ...

    @overload
    def __getitem__(self, number: slice) -> list[AsyncResult[Any]]: ...

    def __getitem__(self, number: int | slice) -> AsyncResult[Any] | list[AsyncResult[Any]]:
        numbers = range(self.length)[number]
        if isinstance(numbers, range):
            return [self.app.AsyncResult(self.id(index)) for index in numbers]
        return self.app.AsyncResult(self.id(numbers))


def submit_many(
    app: Celery,
    task: Task | str,
    arguments: Iterable[Sequence[Any]],
    *,
    kwargs: Mapping[str, Any] | None = None,
    chunk: int = CHUNK,
    progress: Callable[[int], object] | bool | None = None,
    session: Any = None,
    **options: Any,
) -> JobRange:
    """Submit a job of a task for each item of `arguments`, the positional arguments of one job.

    All jobs are durable when this returns. Those of a chunk are durable when `progress` is called, in this thread, with
    the number so far. `progress=True` draws a bar instead, in a terminal or a notebook.

    `kwargs` and `options` are the same for all jobs. The options are those of `apply_async`: cpus=, priority=,
    countdown=, ... Where nothing was written, an error is raised as `delay()` raises it. A later error is raised as
    `PartlyAccepted`, with that error as its cause. With a `session` all jobs are part of its transaction, and errors
    are raised as they are.
    """
    if progress is True:
        with ProgressBar("submitted", len(arguments) if isinstance(arguments, Sized) else None) as bar:
            return submit_many(
                app, task, arguments, kwargs=kwargs, chunk=chunk, progress=bar.show, session=session, **options
            )
    for option in _OPTIONS_OF_ONE & options.keys():
        raise InvalidRequest(f"submit_many({option}=...) is not an option", value=option, advice="Leave it out.")
    check_chunk(chunk)
    resolved: Task | str = app.tasks.get(task, task) if isinstance(task, str) else task
    if not isinstance(resolved, str) and is_unique(resolved):
        advice = "Submit its jobs one by one: only then each of them is compared with the others."
        raise InvalidRequest(
            f"task {resolved.name} is unique, and many are submitted", value=resolved.name, advice=advice
        )
    common, number = uuid()[:_COMMON], 0
    sender = app.amqp.job_sender
    within = None
    if session is not None:
        # Imported late: it loads SQLAlchemy's ORM.
        from celery_capacity.workers.submit.session_jobs import SessionJobs

        within = SessionJobs(sender, app.platform, session).add
    jobs = ChunkWriter(sender, app.platform, attempts.current(), chunk, progress or None, within)
    with stored_together(app, jobs) as gathering:
        call = _Call(app, gathering, resolved, dict(kwargs or {}), options)
        for number, item in enumerate(arguments, 1):
            if number > MAX_NUMBERS:
                raise InvalidRequest(f"{MAX_NUMBERS} jobs are the most of one call")
            if not isinstance(item, (list, tuple)):
                advice = "Give the positional arguments of each job: a list or a tuple, (1,) for one."
                raise InvalidRequest(f"item {number - 1}, {show(item)}, is not valid", value=item, advice=advice)
            call.submit(f"{common}{number - 1:08x}", item)
    return JobRange(app, common, number)


def check_chunk(chunk: Any) -> None:
    if isinstance(chunk, bool) or not isinstance(chunk, int) or not 1 <= chunk <= MAX_IN_CHUNK:
        advice = f"It must be a number of jobs, at most {MAX_IN_CHUNK}."
        raise InvalidRequest(f"chunk {show(chunk)} is not valid", value=chunk, advice=advice)


class _Call:
    """Call of `submit_many`, for all of its jobs."""

    def __init__(
        self, app: Celery, gathering: Gathering, task: Task | str, kwargs: Mapping[str, Any], options: dict[str, Any]
    ) -> None:
        self._app = app
        self._gathering = gathering
        self._task = task
        self._kwargs = kwargs
        self._options = options
        self._sender, self._attempt = app.amqp.job_sender, attempts.current()
        self._check = getattr(task, "__header__", None) if getattr(task, "typing", False) else None
        self._alike = not isinstance(task, str) and options.keys() <= _SAME_FOR_ALL and _is_plain(app, task)
        self._repeats = False
        #: Makes a job of its id and arguments, where a template of the first message does.
        self._fill: Callable[[str, Any], NewJob] | None = None

    def submit(self, job: str, args: Sequence[Any]) -> None:
        """Submit one job."""
        if not self._repeats:
            self._whole_way(job, args)
            self._repeats = self._alike and self._gathering.repeats
            if self._repeats:
                self._fill = self._learn(args)
            return
        if self._check is not None:
            self._check(*args, **self._kwargs)
        if self._fill is None or listens():
            self._gathering.repeat(job, args)
        else:
            filled = self._fill(job, args)
            self._sender.check_backlog(self._attempt, filled.shape)
            self._gathering.add(filled)

    def _learn(self, args: Sequence[Any]) -> Callable[[str, Any], NewJob] | None:
        """Return the function that makes further jobs like the first one, None where Celery makes their messages."""
        templates, first = getattr(self._app, "platform_templates", None), self._gathering.newest
        if templates is None or first is None or self._attempt is not None or self._app.conf.task_send_sent_event:
            return None
        made: Callable[[str, Any], NewJob] | None = templates.like(self._task, first, args, self._kwargs)
        return made

    def _whole_way(self, job: str, args: Sequence[Any]) -> None:
        job_options = {"task_id": job, "add_to_parent": False}
        with active(self._gathering):
            if isinstance(self._task, str):
                self._app.send_task(self._task, args, dict(self._kwargs), **job_options, **self._options)
            else:
                self._task.apply_async(args, dict(self._kwargs), **job_options, **self._options)


def _is_plain(app: Celery, task: Task) -> bool:
    """Return True if nothing but Celery's and the platform's own code looks at each call."""
    ours = is_of(task.apply_async, platform_task)
    behind: Any = super(PlatformTask, task) if ours and isinstance(task, PlatformTask) else task
    return (
        is_of(behind.apply_async, celery_task)
        and is_of(task.shadow_name, celery_task)
        and sends_plainly(app)
        and getattr(task, "_dump_pydantic_arguments", None) is None
        and all(isinstance(route, Router) for route in app.amqp.routes)
        and not app.conf.task_always_eager
    )
