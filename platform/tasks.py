"""The task that every worker of `-A platform` has: it holds the resources of its request and sleeps.

Each call says how much it holds: `app.send_task("demo.sleep", args=[5], cpus=4, memory="2GiB")`.
"""

from __future__ import annotations

import json
import time
from typing import Any

from celery import shared_task

from celery_capacity.workers.process.stores import platform_of

#: Name under which the task is sent.
SLEEP = "demo.sleep"

#: Seconds after which a list of records expires if a killed demo did not delete it.
RECORDS_TTL = 86_400


@shared_task(name=SLEEP, bind=True)
def sleep(self: Any, seconds: float, job: int | None = None, log: str | None = None) -> dict[str, Any]:
    """Sleep, and return this task's own record: start, end (seconds since the epoch) and worker.

    With `log`, the record also goes, with the number `job`, to the Redis list of that name beside the ledger. Each run
    adds an entry, so that a job that ran twice is visible.
    """
    start = time.time()
    time.sleep(seconds)
    end = time.time()
    # Celery's node name is <worker>@<host>. A direct call has no worker, and so no node name.
    worker = str(self.request.hostname or "").partition("@")[0]
    seen = {"job": job, "start": start, "end": end, "worker": worker}
    if log is not None:
        with platform_of(self.app).redis.pipeline(transaction=False) as pipe:
            pipe.rpush(log, json.dumps(seen))
            pipe.expire(log, RECORDS_TTL)
            pipe.execute()
    return seen
