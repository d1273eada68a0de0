"""Imported by a worker of a fault test: one process of its pool is killed just when the worker becomes ready."""

from __future__ import annotations

from typing import Any

import psutil
from celery import signals


@signals.worker_ready.connect(weak=False)
def kill_one(**_: Any) -> None:
    child = psutil.Process().children()[0]
    child.kill()
    # It has ended, and nobody has noticed yet.
    while child.status() != psutil.STATUS_ZOMBIE:
        pass
