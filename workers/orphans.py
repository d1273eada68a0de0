"""What bodies started and a dead worker left behind: processes that would go on beside the next attempt of their job.

The processes of a pool end with their worker by themselves. What a body started (`subprocess` and the like) does not:
it is known by a variable that it inherited, and ended by whoever takes the dead life's jobs back on the same machine.
"""

from __future__ import annotations

import logging
import os
from typing import Final

import psutil

from routing.process_identity import Place
from routing.roster import WorkerRow
from workers.identity import is_known_dead

logger = logging.getLogger(__name__)

#: In the environment of what a worker's bodies start: the life of the worker. (No setting: nobody else sets it.)
VARIABLE: Final = "CELERY_CAPACITY_INCARNATION"


def mark(incarnation: str) -> None:
    """From now on what this process and its pool start carries this life's name."""
    os.environ[VARIABLE] = incarnation


def see_to(row: WorkerRow | None, here: Place) -> int:
    """End what a life of a worker left on this machine, if this machine knows that it is dead; return the number of
    ended processes."""
    if row is None or not is_known_dead(row, here):
        return 0
    ended = 0
    for process in psutil.process_iter():
        try:
            if process.environ().get(VARIABLE) == row.incarnation:
                process.kill()
                ended += 1
        except psutil.Error:
            continue  # it ended meanwhile, or belongs to somebody else
    if ended:
        logger.warning("%d processes that the dead worker %s had left were ended", ended, row.name)
    return ended
