"""A module for a worker of a fault test: it kills a process of the pool just when the worker becomes ready."""

from __future__ import annotations

from typing import Any

import psutil
from celery import signals


@signals.worker_ready.connect(weak=False)
def kill_one(**_: Any) -> None:
    child = psutil.Process().children()[0]
    child.kill()
    # The process has ended, and nobody has noticed yet.
    while child.status() != psutil.STATUS_ZOMBIE:
        pass
