"""A job's own lines: what its body logs and prints, kept in Postgres where `PLATFORM_KEEP_LOGS` asks for it.

A handler takes the lines in the body's thread and numbers them. A thread of the process writes them in batches. No body
waits for that: while Postgres is away the oldest lines give way to the newest, and the numbers show the gap. Lines of
threads that a body starts are not taken, since nothing says whose they are.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from typing import Any, ClassVar, Final

from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy.exc import SQLAlchemyError

from celery_capacity.routing.database import job_lines
from celery_capacity.routing.database.job_lines import JobLine
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.results.batch_thread import BatchThread, Left

logger = logging.getLogger(__name__)

#: Lines of a process that wait for Postgres: 20 million characters at the most.
MAX_PENDING: Final = 5_000
#: Characters of a line that wait: a little more than is kept.
LONGEST: Final = 2 * job_lines.MESSAGE_LENGTH
#: Seconds for the last lines of a process that ends.
LAST_WITHIN: Final = 2.0
#: Logger of Celery's lines about an end, which the job's row has.
OF_CELERY: Final = "celery.app.trace"
#: Logger whose lines Celery does not pass on to the root.
TASK_LOGGER: Final = "celery.task"


class LineWriter(BatchThread[JobLine]):
    """Thread that writes the lines of a process's jobs. `lost`: lines that gave way to newer ones."""

    most: ClassVar[int] = 500
    collects: ClassVar[float] = 0.2
    retry_after: Sequence[float] = (1.0, 2.0, 5.0)

    def __init__(self, stores: Stores, keep: int) -> None:
        super().__init__("job-lines")
        self._stores = stores
        self._keep = keep
        self.lost = 0
        #: True once it was said that Postgres takes no lines.
        self._failed = False

    def of_this_process(self) -> LineWriter:
        """Return the writer, which a process of the pool has from its parent without a thread."""
        if self._pid != os.getpid():
            self.start()
        return self

    def add(self, items: Iterable[JobLine]) -> None:
        with self._changed:
            super().add(items)
            while len(self._pending) > MAX_PENDING:
                self._pending.popleft()
                self.lost += 1

    def _work(self, batch: Sequence[JobLine], *, again: bool) -> Left[JobLine]:
        try:
            with self._stores.engine.connect() as connection:
                job_lines.write(connection, batch, self._keep)
        except SQLAlchemyError as error:
            if not self._failed:
                logger.warning("Postgres takes no lines of jobs, the newest are kept: %s", type(error).__name__)
            self._failed = True
            return Left(batch)
        if self.lost:
            logger.warning("%d lines of jobs are lost: Postgres did not take them in time", self.lost)
        self._failed, self.lost = False, 0
        return Left()

    def _give_up(self) -> None:
        logger.warning("%d lines of jobs are lost: Postgres does not take them", self.lost + len(self._pending))


#: Writers of the workers of this process, by their incarnations.
_writers: Final[dict[str, LineWriter]] = {}


class _Run:
    """Body that runs in a thread. `busy`: it is about to keep a line, whose own lines are not kept."""

    __slots__ = ("attempt", "busy", "number", "writer")

    def __init__(self, attempt: Attempt, writer: LineWriter) -> None:
        self.attempt = attempt
        self.writer = writer
        self.number = 0
        self.busy = False


_of_thread = threading.local()


class KeptLines(logging.Handler):
    """Handler that keeps the lines of the body that runs in its thread."""

    def emit(self, record: logging.LogRecord) -> None:
        run: _Run | None = getattr(_of_thread, "run", None)
        if run is None or run.busy or record.name == OF_CELERY:
            return
        run.busy = True
        try:
            run.number += 1
            run.writer.add([_line(run, record)])
        except SoftTimeLimitExceeded:
            raise
        except Exception:
            self.handleError(record)
        finally:
            run.busy = False


def _line(run: _Run, record: logging.LogRecord) -> JobLine:
    message = record.getMessage()
    if record.exc_info and record.exc_info[0] is not None:
        message = f"{message}\n{_FORMATTER.formatException(record.exc_info)}"
    if len(message) > LONGEST:
        # The writer hides secrets before it cuts. Of a URL that is cut here, it would not see that it has a password.
        message = message[:LONGEST].rsplit(maxsplit=1)[0]
    tag, at = run.attempt.tag, datetime.fromtimestamp(record.created, UTC)
    # A program may name a level by anything.
    level, name = str(record.levelname), str(record.name)
    return JobLine(tag.job, tag.token.epoch, tag.token.attempt, run.number, at, level, name, message)


_FORMATTER: Final = logging.Formatter()
_HANDLER: Final = KeptLines()
_NOTHING: Final = nullcontext()


def keeping(attempt: Attempt) -> AbstractContextManager[Any]:
    """Return the block within which the lines of this thread are the attempt's. Does nothing where none are kept."""
    writer = _writers.get(attempt.incarnation) if _writers else None
    return _NOTHING if writer is None else _keeping(attempt, writer)


@contextmanager
def _keeping(attempt: Attempt, writer: LineWriter) -> Iterator[None]:
    _attach()
    _of_thread.run = _Run(attempt, writer.of_this_process())
    try:
        yield
    finally:
        _of_thread.run = None


def _attach() -> None:
    """Have the handler hear all loggers. Celery, or the user, may have set up the logs anew since the last body."""
    root, task = logging.getLogger(), logging.getLogger(TASK_LOGGER)
    for log in (root,) if task.propagate else (root, task):
        if _HANDLER not in log.handlers:
            log.addHandler(_HANDLER)


def begin(stores: Stores, incarnation: str) -> None:
    """Keep the lines of the jobs of a worker, where its settings ask for it. Called before the pool forks."""
    if keep := stores.settings.keep_logs:
        writer = _writers[incarnation] = LineWriter(stores, keep)
        writer.start()


def end(incarnation: str) -> None:
    """Write the last lines of a worker that ends."""
    writer = _writers.pop(incarnation, None)
    if writer is not None:
        writer.stop(LAST_WITHIN)
        for log in (logging.getLogger(), logging.getLogger(TASK_LOGGER)):
            if not _writers:
                log.removeHandler(_HANDLER)


def on_worker_process_shutdown(**_: Any) -> None:
    """Write the last lines of a process of the pool that ends."""
    for writer in list(_writers.values()):
        writer.flush(LAST_WITHIN)
