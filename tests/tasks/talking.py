"""Tasks that log and print."""

from __future__ import annotations

import logging
from typing import Any

from celery import shared_task
from celery.utils.log import get_task_logger

from tests.fixtures import tasks


@shared_task(bind=True)
def talk(self: Any, gate: str) -> None:
    """Log by the root and by Celery's logger of tasks, print, wait at the gate, and log once more."""
    logging.getLogger(__name__).info("frame %d", 7)
    get_task_logger(__name__).warning("slow")
    print("printed")
    tasks.held_at(gate, self.request.id)
    logging.getLogger(__name__).info("password=hunter2")
