"""Give jobs another priority, and say of each what became of it.

The rows have the priority first, so a job that comes to the ledger later comes with it. Then the ledger moves the jobs
that wait there. A job on its way to the ledger may arrive there with its former priority. So a job that the ledger does
not have is looked for again, for a moment. A job that is due counts as such. A reconcile repairs what is left.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from redis.exceptions import RedisError

from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.errors import InvalidRequest, StoreUnavailable
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import LedgerClosed, PlaceVerdict
from celery_capacity.routing.model.identifiers import check_job_id
from celery_capacity.routing.model.states import HOLDING, State, Store
from celery_capacity.routing.policy.placement import TOP_PRIORITY
from celery_capacity.routing.recovery import revocation
from celery_capacity.routing.store import claims, controls
from celery_capacity.routing.store.controls import Ranked
from celery_capacity.workers.client.controls import operator
from celery_capacity.workers.process.stores import Stores, transactions

#: Jobs in one step.
STEP: Final = 500
#: Pauses in seconds before a job is looked for again that the ledger does not have.
AGAIN_AFTER: Final = (0.02, 0.1, 0.3)
#: Unknown ids that an error names.
SHOWN_UNKNOWN: Final = 5


class Became(StrEnum):
    """Result of a new priority for one job; the value is the word in JSON."""

    #: it waits, or is scheduled, and has its new place
    MOVED = "moved"
    #: it runs: its next attempt has the priority
    NEXT_ATTEMPT = "next-attempt"
    #: it had ended before
    ENDED_BEFORE = "ended-before"


@dataclass(frozen=True, slots=True)
class Reprioritized:
    """A job with its priority. `before`: the former one, None where the job had ended."""

    job: str
    became: Became
    state: State
    priority: int | None
    before: int | None

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.job,
            "became": self.became.value,
            "state": self.state.value,
            "priority": self.priority,
            "before": self.before,
        }


def set_priority(
    stores: Stores, jobs: Sequence[str], priority: int, *, reason: str | None = None, by: str | None = None
) -> list[Reprioritized]:
    """Give jobs that have not ended a priority, 0 to 9, and return what became of each.

    A waiting job has its new place at once. Raises `InvalidRequest` for unknown ids and for another number, before
    anything is written, and `StoreUnavailable`.
    """
    if priority not in range(TOP_PRIORITY + 1) or isinstance(priority, bool):
        advice = f"It must be a whole number from 0 to {TOP_PRIORITY}; {TOP_PRIORITY} comes first."
        raise InvalidRequest(f"priority {priority} is not valid", value=priority, advice=advice)
    ids = list(dict.fromkeys(check_job_id(job) for job in jobs))
    with translated("nothing was changed: "), stores.engine.connect() as connection:
        standing = revocation.standing(connection, ids)
    unknown = [job for job in ids if job not in standing]
    if unknown:
        more = f" and {len(unknown) - SHOWN_UNKNOWN} more" if len(unknown) > SHOWN_UNKNOWN else ""
        advice = "Nothing was changed. `celery -A platform jobs` lists the newest jobs."
        raise InvalidRequest(
            f"there is no job {', '.join(unknown[:SHOWN_UNKNOWN])}{more}", value=unknown[0], advice=advice
        )
    ranked: dict[str, Ranked] = {}
    for start in range(0, len(ids), STEP):
        ranked |= _step(stores, ids[start : start + STEP], priority, controls.tidy(reason), operator(by))
    return [_result(job, ranked.get(job), standing[job].state) for job in ids]


def _step(stores: Stores, ids: Sequence[str], priority: int, reason: str | None, by: str) -> dict[str, Ranked]:
    with translated(), transactions(stores.engine).begin() as connection:
        controls.lock(connection)
        ranked = controls.set_priority(connection, ids, priority)
        for job, row in ranked.items():
            controls.log(connection, "priority", [job], by, reason, {"priority": priority, "before": row.before})
    _move(stores, ranked)
    return ranked


def _move(stores: Stores, ranked: dict[str, Ranked]) -> None:
    """Have the ledger move these jobs. Where it does not answer, the rows alone have the priority for now."""
    ledger, left = stores.new_ledger(), dict(ranked)
    try:
        for pause in (0.0, *AGAIN_AFTER):
            time.sleep(pause)
            with translated(), stores.engine.connect() as connection:
                authority = read_authority(connection)
                if pause:
                    left = controls.ranked(connection, list(left))
                if authority.authority == Store.POSTGRES:
                    claims.wake(connection)
                    return
            ledger.epoch = authority.epoch
            left = _missing(ledger, left)
            if not left:
                return
    except (LedgerClosed, StoreUnavailable, RedisError):
        # A rebuild files the rows with their priority, and a reconcile compares it.
        return
    finally:
        ledger.client.close()


def _missing(ledger: Ledger, ranked: dict[str, Ranked]) -> dict[str, Ranked]:
    """Move jobs in the ledger; return those that it does not have though they are on their way there."""
    rows = list(ranked.values())
    verdicts = ledger.reprioritize([(row.job, row.order, row.behind or "") for row in rows])
    ledger.place_shapes(row.behind for row in rows if row.behind)
    on_their_way = (State.ACCEPTED, State.WAITING, *HOLDING)
    return {
        row.job: row
        for row, verdict in zip(rows, verdicts, strict=True)
        if verdict is PlaceVerdict.MISSING and (row.state in on_their_way or (row.state is State.SCHEDULED and row.due))
    }


def _result(job: str, row: Ranked | None, state: State) -> Reprioritized:
    if row is None:
        return Reprioritized(job, Became.ENDED_BEFORE, state, None, None)
    became = Became.NEXT_ATTEMPT if row.state in HOLDING else Became.MOVED
    return Reprioritized(job, became, row.state, row.priority, row.before)
