"""The invariants I1, I2, I3, I4 and I6, checked over both stores.

| name | holds | what it says |
| --- | --- | --- |
| I1 | always | no worker has more allocated than it has, and each book is the sum of what the worker holds |
| I2 | at rest | every accepted job has exactly one final state |
| I3 | at rest | every allocation is zero, in Redis and in Postgres |
| I4 | always | at most one attempt of a job is open, tokens grow, the row is of the newest attempt |
| I6 | always | Redis equals Postgres but for transitions on their way there, and the ledger agrees with itself |

The benchmarks judge I5: no job waits while a worker could take it. Work may go on during a check. So a suspicion is
read again, and it is a violation only if it is still there after `PATIENCE`, with the same tokens and amounts. On a
busy machine a single reading may take longer than that, so `PATIENCE` counts from the end of the first reading.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Final

import redis as redispy
from redis.exceptions import RedisError
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.routing.database.postgres_errors import translate
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.forecast import record
from celery_capacity.routing.forecast.record import Errors
from celery_capacity.routing.inspect import audit, held_back
from celery_capacity.routing.inspect.audit import Progress, Suspicion

#: Seconds after which a suspicion that stays is a violation. Longer than a rebuild waits for the workers (2 s), and far
#: longer than an outcome takes to reach Postgres.
PATIENCE: Final = 4.0
#: Seconds after which Postgres has every transition of the ledger, where the caller does not say.
WRITE_WITHIN: Final = 20.0
#: Seconds between two readings.
PAUSE: Final = 0.1
#: Violations that a verdict shows.
SHOWN: Final = 10

#: name -> (its statement, True if it holds only at rest)
INVARIANTS: Final = {
    "I1": ("no worker is allocated above its capacity, and its book is the sum of what it holds", False),
    "I2": ("every accepted job has exactly one final state", True),
    "I3": ("every allocation is zero, in Redis and in Postgres", True),
    "I4": ("only the newest attempt of a job is open, and tokens grow", False),
    "I6": ("Redis equals Postgres, but for what is on its way", False),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on an invariant. `holds`: None where it holds only at rest and work runs, so it was not judged."""

    name: str
    says: str
    holds: bool | None
    only_at_rest: bool
    violations: int
    detail: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The verdicts. `at_rest`: no job waited or ran."""

    at_rest: bool
    verdicts: tuple[Verdict, ...]
    #: Errors of estimated starts so far; None where none has been compared.
    estimates: Errors | None = None

    @property
    def holds(self) -> bool:
        """Return whether all invariants that could be judged hold."""
        return all(verdict.holds is not False for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        verdicts = [{**asdict(verdict), "detail": list(verdict.detail)} for verdict in self.verdicts]
        estimates = None if self.estimates is None else self.estimates.to_json()
        return {"at_rest": self.at_rest, "holds": self.holds, "verdicts": verdicts, "estimates": estimates}

    def lines(self) -> list[str]:
        """Return the violations that are shown, a line for each."""
        broken = (verdict for verdict in self.verdicts if verdict.holds is False)
        return [f"{v.name}: {line}" for v in broken for line in v.detail]


def check(
    engine: Engine,
    client: redispy.Redis,
    at_rest: bool | None = None,
    patience: float | None = None,
    write_within: float = WRITE_WITHIN,
    progress: Progress | None = None,
) -> Report:
    """Judge the invariants. `at_rest`: judge as at rest or not; None: find out.

    `write_within`: seconds after which Postgres has every transition that the ledger noted, while a worker lives.
    `progress`: called in the first reading, with the jobs that are read, of how many.
    Returns at once where there is no suspicion, and after `patience` seconds (default PATIENCE) where one stays. Raises
    StoreUnavailable where a store does not answer: its content cannot be judged.
    """
    patience = PATIENCE if patience is None else patience
    suspicions, resting = _read(engine, client, at_rest, write_within, progress)
    end = time.monotonic() + patience
    while suspicions and time.monotonic() < end:
        time.sleep(PAUSE)
        again, resting = _read(engine, client, at_rest, write_within)
        suspicions &= again
    verdicts = tuple(_verdict(name, suspicions, resting) for name in INVARIANTS)
    return Report(resting, verdicts, _errors(engine))


def _read(
    engine: Engine,
    client: redispy.Redis,
    at_rest: bool | None,
    write_within: float,
    progress: Progress | None = None,
) -> tuple[set[Suspicion], bool]:
    try:
        with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            rows = audit.read_postgres(connection)
            held = {audit.Suspicion("I6", difference) for difference in held_back.differences(connection, client)}
        ledger = audit.read_ledger(client, progress)
    except (DBAPIError, PoolTimeout) as error:
        raise translate(error) from error
    except RedisError as error:
        raise StoreUnavailable(f"Redis does not answer: {error}") from error
    resting = rows.at_rest if at_rest is None else at_rest
    return audit.inspect(ledger, rows, resting, write_within) | held, resting


def _errors(engine: Engine) -> Errors | None:
    try:
        with engine.connect() as connection:
            return record.errors(connection)
    except (DBAPIError, PoolTimeout) as error:
        raise translate(error) from error


def _verdict(name: str, suspicions: set[Suspicion], resting: bool) -> Verdict:
    says, only_at_rest = INVARIANTS[name]
    violations = sorted(suspicion.evidence for suspicion in suspicions if suspicion.invariant == name)
    holds = None if only_at_rest and not resting else not violations
    return Verdict(name, says, holds, only_at_rest, len(violations), tuple(violations[:SHOWN]))
