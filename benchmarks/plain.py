"""Plain Celery, as `Celery(...)` makes it: default settings, Redis as broker and result backend."""

from __future__ import annotations

import os

from celery import Celery

#: Environment: the Redis URL of the plain side, the same server as ours with another database number.
PLAIN_URL = "BENCH_PLAIN_URL"


def create() -> Celery:
    """The plain application. Raises KeyError when `BENCH_PLAIN_URL` is not set."""
    url = os.environ[PLAIN_URL]
    return Celery("plain", broker=url, backend=url, include=["benchmarks.tasks"])


if PLAIN_URL in os.environ:
    app = create()  # what `celery -A benchmarks.plain` looks for
