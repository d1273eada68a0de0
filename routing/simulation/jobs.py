"""Jobs of a simulation: those that come, those that are there at the beginning, and their starts."""

from __future__ import annotations

from typing import NamedTuple

from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.placement import Waiting
from celery_capacity.routing.policy.reservation import Held


class Submission(NamedTuple):
    """A job of a trace: when it comes, how long it runs, what it asks for. `task` groups jobs with like run times.

    `terms`: where it may run and whose it is, as in its shape. `expected`: the time (ms) that was expected of it when
    it came, 0 for unknown.
    """

    job: str
    at: int
    run: int
    request: Request
    task: str = ""
    priority: int = 0
    terms: str = ""
    expected: int = 0


class Start(NamedTuple):
    """Start of a job in a simulation. `ended`: 0 for a job that stays."""

    job: str
    submitted: int
    started: int
    ended: int
    worker: str


class Running(NamedTuple):
    """A job that holds room on a worker at the beginning. `ends`: the time (ms) of its end, 0 where it stays."""

    job: str
    worker: str
    held: Held
    ends: int
    terms: str = ""


class Queued(NamedTuple):
    """A job that waits at the beginning. `run`: its run time (ms), 0 where it stays once it has started."""

    waiting: Waiting
    run: int
