"""The invariants I1, I2, I3, I4 and I6, checked over both stores.

| name | holds | what it says |
| --- | --- | --- |
| I1 | always | no worker has more allocated than it has, and each book is the sum of what the worker holds |
| I2 | at rest | every accepted job has exactly one final state |
| I3 | at rest | every allocation is zero, in Redis and in Postgres |
| I4 | always | at most one attempt of a job is open, tokens grow, the row is of the newest attempt |
| I6 | always | Redis equals Postgres but for transitions on their way there, and the ledger agrees with
itself |

(I5, that no job waits while a worker could take it, is judged by the benchmarks.) Work may go on: what looks
wrong is read again, and only what is still there, with the same tokens and amounts, after `PATIENCE` is a
violation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

import redis as redispy
from redis.exceptions import RedisError
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from celery_capacity.routing.database.postgres import translate
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.inspect import audit
from celery_capacity.routing.inspect.audit import Suspicion

#: Seconds for which something must look wrong before it is: longer than a rebuild waits for the workers (2
#: s), and far longer than an outcome takes to Postgres.
PATIENCE: Final = 4.0
#: Seconds after which Postgres has what the ledger noted, where nobody says otherwise.
WRITE_WITHIN: Final = 20.0
#: Seconds between two readings.
PAUSE: Final = 0.1
#: Violations that a verdict shows.
SHOWN: Final = 10

#: name -> (what it says, whether it holds only at rest)
INVARIANTS: Final = {
    "I1": ("no worker is allocated above its capacity, and its book is the sum of what it holds", False),
    "I2": ("every accepted job has exactly one final state", True),
    "I3": ("every allocation is zero, in Redis and in Postgres", True),
    "I4": ("only the newest attempt of a job is open, and tokens grow", False),
    "I6": ("Redis equals Postgres, but for what is on its way", False),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One invariant. `holds` is None where it was not judged: it holds only at rest, and work runs."""

    name: str
    says: str
    holds: bool | None
    only_at_rest: bool
    violations: int
    detail: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "says": self.says,
            "holds": self.holds,
            "only_at_rest": self.only_at_rest,
            "violations": self.violations,
            "detail": list(self.detail),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """The verdicts, and whether the platform was at rest: nothing waited or ran."""

    at_rest: bool
    verdicts: tuple[Verdict, ...]

    @property
    def holds(self) -> bool:
        """Whether all that could be judged holds."""
        return all(verdict.holds is not False for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        return {
            "at_rest": self.at_rest,
            "holds": self.holds,
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
        }

    @property
    def ok(self) -> bool:
        """The same, by the name that tests use."""
        return self.holds

    def lines(self) -> list[str]:
        """What is violated, a line each."""
        broken = (verdict for verdict in self.verdicts if verdict.holds is False)
        return [f"{v.name}: {line}" for v in broken for line in v.detail]


def check(
    engine: Engine,
    client: redispy.Redis,
    at_rest: bool | None = None,
    patience: float | None = None,
    write_within: float = WRITE_WITHIN,
) -> Report:
    """Judge the invariants. `at_rest`: judge as if at rest or not; None: find out. `write_within`: seconds after which
    Postgres has what the ledger noted, while a worker lives.

    Returns at once where nothing looks wrong, after `patience` (PATIENCE) seconds where something does.
    Raises StoreUnavailable where a store does not answer: what it holds cannot be judged.
    """
    end = time.monotonic() + (PATIENCE if patience is None else patience)
    found, resting = _read(engine, client, at_rest, write_within)
    while found and time.monotonic() < end:
        time.sleep(PAUSE)
        again, resting = _read(engine, client, at_rest, write_within)
        found &= again
    return Report(resting, tuple(_verdict(name, found, resting) for name in INVARIANTS))


def _read(
    engine: Engine, client: redispy.Redis, at_rest: bool | None, write_within: float
) -> tuple[set[Suspicion], bool]:
    try:
        with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            rows = audit.read_postgres(connection)
        shelf = audit.read_ledger(client)
    except DBAPIError as error:
        raise translate(error) from error
    except RedisError as error:
        raise StoreUnavailable(f"Redis does not answer: {error}") from error
    resting = rows.at_rest if at_rest is None else at_rest
    return audit.inspect(shelf, rows, resting, write_within), resting


def _verdict(name: str, found: set[Suspicion], resting: bool) -> Verdict:
    says, only_at_rest = INVARIANTS[name]
    violations = sorted(suspicion.evidence for suspicion in found if suspicion.invariant == name)
    holds = None if only_at_rest and not resting else not violations
    return Verdict(name, says, holds, only_at_rest, len(violations), tuple(violations[:SHOWN]))
