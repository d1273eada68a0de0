"""The task that every worker of `-A platform` has: it holds what it asked for and sleeps.

How much it holds is said per call: `app.send_task("demo.sleep", args=[5], cpus=4, memory="2GiB")`.
"""

from __future__ import annotations

import json
import time
from typing import Any

from celery import shared_task

from celery_capacity.workers.app.install import platform_of

__all__ = ["SLEEP", "sleep"]

#: The name under which it is sent.
SLEEP = "demo.sleep"

#: Seconds after which a list of records vanishes that no demo took away, because it was killed.
RECORDS_TTL = 86_400


@shared_task(name=SLEEP, bind=True)
def sleep(self: Any, seconds: float, job: int | None = None, log: str | None = None) -> dict[str, Any]:
    """Sleep, and return what this task saw of itself: start, end (seconds since the epoch) and worker.

    With `log`, the same goes, with the number `job`, to the Redis list of that name beside the ledger, one
    entry for each run: so a job that ran twice shows.
    """
    start = time.time()
    time.sleep(seconds)
    end = time.time()
    # Celery's node name is <worker>@<host>; without a worker (a direct call) there is none.
    worker = str(self.request.hostname or "").partition("@")[0]
    seen = {"job": job, "start": start, "end": end, "worker": worker}
    if log is not None:
        with platform_of(self.app).redis.pipeline(transaction=False) as pipe:
            pipe.rpush(log, json.dumps(seen))
            pipe.expire(log, RECORDS_TTL)
            pipe.execute()
    return seen
