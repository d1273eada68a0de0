"""A project while it moves over: `ROLLING=plain` in the environment makes it the former project."""

from __future__ import annotations

import os

import redis
from celery import Celery

from celery_capacity import install

#: Hash: number -> how often it ran.
RAN = "rolling:ran"


def make(plain: bool) -> Celery:
    """Return the project's app: as it was, or on the platform."""
    url = os.environ["REDIS_URL"]
    app = Celery("rolling", broker=url, backend=url, set_as_current=False)
    if not plain:
        install(app)

    @app.task(name="rolling.count", shared=False, bind=True, max_retries=3)
    def count(self, number: int) -> str:  # type: ignore[no-untyped-def]
        """Count this run in Redis; every tenth number fails once before it counts."""
        if number % 10 == 0 and self.request.retries == 0:
            raise self.retry(countdown=0.1)
        with redis.Redis.from_url(os.environ["REDIS_URL"]) as client:
            client.hincrby(RAN, str(number), 1)
        return f"{number} on {self.request.hostname.partition('@')[0]}"

    return app


app = make(os.environ["ROLLING"] == "plain") if "ROLLING" in os.environ else None
