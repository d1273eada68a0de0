"""The audit around an action: its row is written before the action, and its outcome after it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database import audit
from celery_capacity.routing.database.audit import Actor, Outcome, Way
from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.errors import PlatformError, StoreUnavailable
from celery_capacity.workers.client.controls import operator
from celery_capacity.workers.process.stores import Stores

logger = logging.getLogger(__name__)


@dataclass
class Note:
    """The row of an action under way: its number, its number of targets, and what is to be written at its end."""

    seq: int
    targets: int
    outcome: Outcome = Outcome.DONE
    details: dict[str, Any] = field(default_factory=dict)

    def count(self, words: Sequence[str], failures: int) -> None:
        """Note how many targets had which result so far, and how many of them failed."""
        self.details.update({word: words.count(word) for word in dict.fromkeys(words)})
        done = len(words) - failures
        if done < self.targets:
            self.outcome = Outcome.PARTLY if done else Outcome.REFUSED

    def fail(self, error: Exception) -> None:
        """Note an error: a refusal where it surely came first. A store that goes away may have taken the action."""
        early = isinstance(error, PlatformError) and not isinstance(error, StoreUnavailable)
        self.outcome = Outcome.REFUSED if early and not self.details else Outcome.PARTLY
        self.details["error"] = str(error)


def commanding(by: str | None = None) -> Actor:
    """Return the operator of a command: the given name, else user@host."""
    return Actor(operator(by), Way.CLI)


@contextmanager
def audited(
    stores: Stores, actor: Actor, action: str, targets: Sequence[str], details: Mapping[str, Any] | None = None
) -> Iterator[Note]:
    """Note an action in the audit, and at the end of the block its outcome.

    Raises `StoreUnavailable` before the block where Postgres does not take the row: nothing happens without one.
    """
    with translated(f"nothing was done ({action}): "), stores.engine.connect() as connection:
        note = Note(audit.begin(connection, actor, action, targets, details or {}), len(targets))
    actor.noted(note.seq)
    try:
        yield note
    except Exception as error:
        note.fail(error)
        raise
    finally:
        _end(stores, note)


def _end(stores: Stores, note: Note) -> None:
    """Write the outcome. The action is over, so a store that went away meanwhile is no error of it."""
    try:
        with stores.engine.connect() as connection:
            audit.end(connection, note.seq, note.outcome, note.details)
    except (DBAPIError, PoolTimeout) as error:
        logger.warning("the audit has no outcome of action %d: %s", note.seq, error)
