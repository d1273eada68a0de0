"""Plain Celery, as `Celery(...)` makes it: default settings, Redis as broker and result backend."""

from __future__ import annotations

import os

from celery import Celery

#: Environment variable with the Redis URL of the plain side: the same server as ours, another database number.
PLAIN_URL = "BENCH_PLAIN_URL"


def create() -> Celery:
    """Return the plain application. Raise KeyError if `BENCH_PLAIN_URL` is not set."""
    url = os.environ[PLAIN_URL]
    return Celery("plain", broker=url, backend=url, include=["benchmarks.tasks"])


if PLAIN_URL in os.environ:
    app = create()  # the app of `celery -A benchmarks.plain`
