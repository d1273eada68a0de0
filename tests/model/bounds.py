"""Bounds within which the model is exhausted: by each test run, and by hand."""

from __future__ import annotations

from typing import Final

from tests.model.state import Bounds, Faults, Rules

#: Bounds that `make test` exhausts. Each has two workers. A fault may come at any step, once.
USUAL: Final = (
    Bounds("a worker crashes", 2, True, Faults(crash=1)),
    Bounds("a worker crashes, no second run", 2, False, Faults(crash=1)),
    Bounds("a worker is stopped", 2, True, Faults(pause=1)),
    Bounds("an answer is lost", 2, True, Faults(lost_answer=1)),
    Bounds("a message comes twice", 2, True, Faults(redelivery=1)),
    Bounds("Redis comes back empty", 2, True, Faults(emptied=1)),
    Bounds("Redis comes back with its data", 2, True, Faults(restarted=1)),
    Bounds(
        "Redis comes back empty, a worker crashes, an answer is lost",
        1,
        True,
        Faults(emptied=1, crash=1, lost_answer=1),
    ),
    Bounds("Redis comes back empty, a worker is stopped", 1, True, Faults(emptied=1, pause=1)),
    Bounds(
        "Redis comes back with its data, a worker crashes, an opener is overtaken",
        1,
        True,
        Faults(restarted=1, crash=1, silent_opener=1),
    ),
    Bounds(
        "Redis comes back with its data, a worker is stopped, one crashes, no second run",
        1,
        False,
        Faults(restarted=1, pause=1, crash=1),
    ),
    Bounds(
        "a worker is stopped, one crashes, an answer is lost, a message comes twice, no second run",
        1,
        False,
        Faults(pause=1, crash=1, lost_answer=1, redelivery=1),
    ),
)
#: Bounds that `python -m tests.model --large` exhausts: two jobs, and two faults beside each other.
LARGE: Final = (
    *USUAL,
    Bounds("two jobs: Redis comes back empty, a worker crashes", 2, True, Faults(emptied=1, crash=1)),
    Bounds(
        "two jobs: Redis comes back with its data, an opener is overtaken",
        2,
        True,
        Faults(restarted=1, silent_opener=1),
    ),
    Bounds("two jobs: a worker crashes, an answer is lost", 2, True, Faults(crash=1, lost_answer=1)),
)


def without(*names: str) -> Rules:
    """Return the rules without these."""
    return Rules()._replace(**dict.fromkeys(names, False))
