"""Lines of the log as JSON objects, each with the job, the attempt, the worker and the task that it is about.

Celery sets up the log of a worker and of beat. With `PLATFORM_LOG_FORMAT=json` its handlers stay, and get another
formatter. Handlers that Celery did not make keep theirs. A process of the pool inherits it all.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from celery_capacity.routing.config.redaction import hidden_lines
from celery_capacity.workers.logs.log_format import is_asked_for


def line_of(level: str, logger: str, message: str, at: float | None = None, **fields: Any) -> str:
    """Return a line. Fields that are None are left out, and secrets in the message are hidden.

    Escaped characters alone: no text of a task breaks a line, or is more than the stream can encode.
    """
    time = datetime.now(UTC) if at is None else datetime.fromtimestamp(at, UTC)
    line = {
        "time": time.isoformat(timespec="milliseconds"),
        "level": level,
        "logger": logger,
        "message": hidden_lines(message),
        **fields,
    }
    return json.dumps({name: value for name, value in line.items() if value is not None}, default=str)


def message_of(line: str) -> str | None:
    """Return the message of a line in JSON; None for any other text."""
    if not line.startswith("{"):
        return None
    try:
        message = json.loads(line).get("message")
    except ValueError:
        return None
    return message if isinstance(message, str) else None


class JsonFormatter(logging.Formatter):
    """Formatter of lines in JSON. `worker`: name of the worker, None outside of one."""

    worker: str | None = None

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record. Fields that nobody knows are left out."""
        about = _job_of(record)
        about["exception"] = self._exception(record)
        worker = type(self).worker
        return line_of(record.levelname, record.name, record.getMessage(), record.created, worker=worker, **about)

    def _exception(self, record: logging.LogRecord) -> str | None:
        if not record.exc_info or record.exc_info[0] is None:
            return None
        return hidden_lines(self.formatException(record.exc_info))


def _job_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the job, the attempt and the task: those of the body that runs in this thread, or that Celery names."""
    # Imported here: a dashboard has such lines without Celery.
    attempts = sys.modules.get("celery_capacity.workers.process.attempts")
    attempt = None if attempts is None else attempts.current()
    # Celery's lines about a task (received, succeeded, failed) have it in `data`.
    data = getattr(record, "data", None)
    about = data if isinstance(data, dict) else {}
    job, task = about.get("id"), about.get("name")
    if attempt is None:
        return {"job": job, "task": task}
    from celery import current_task

    if task is None and current_task:
        task = current_task.name
    return {"job": attempt.tag.job, "attempt": attempt.tag.token.attempt, "task": task}


def on_after_setup_logger(logger: Any = None, **_: Any) -> None:
    """Give the handlers that Celery has made for a log the formatter that the environment asks for."""
    from celery.app.log import TaskFormatter
    from celery.utils.log import ColorFormatter

    if not is_asked_for():
        return
    for handler in logger.handlers:
        if type(handler.formatter) in (ColorFormatter, TaskFormatter):
            handler.setFormatter(JsonFormatter())


def set_up_early() -> None:
    """Have the lines from before a log is set up in JSON too, where the environment asks so."""
    if is_asked_for() and logging.lastResort is not None:
        logging.lastResort.setFormatter(JsonFormatter())


def set_up() -> None:
    """Set up the log of a process without Celery: lines in JSON on standard error, where the environment asks so."""
    root = logging.getLogger()
    if is_asked_for() and not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
        root.addHandler(handler)
