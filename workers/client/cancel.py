"""Cancel jobs for good, and say of each what became of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from celery import Celery

from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.errors import InvalidRequest, show
from celery_capacity.routing.inspect import job_events
from celery_capacity.routing.model.identifiers import check_job_id
from celery_capacity.routing.model.states import FINAL, HOLDING, State
from celery_capacity.routing.recovery import revocation
from celery_capacity.routing.recovery.revocation import Standing
from celery_capacity.workers.process.stores import Stores

#: Jobs that are cancelled in one step, after which the caller hears of them.
STEP: Final = 50
#: Seconds for the answers of workers that are to end running jobs. They come within milliseconds.
ANSWER_WITHIN: Final = 3.0
#: Unknown ids that an error names.
SHOWN_UNKNOWN: Final = 5


class Became(StrEnum):
    """Result of a cancel for one job; the value is the word in JSON."""

    #: it had not started, and has ended
    CANCELLED = "cancelled"
    #: a worker holds it: it goes on to its end, and no attempt follows
    RUNS_ON = "runs-on"
    #: its process has been told to end
    TERMINATING = "terminating"
    #: it runs in a thread, which cannot be ended
    CANNOT_TERMINATE = "cannot-terminate"
    #: it had ended before
    ENDED_BEFORE = "ended-before"
    #: it is marked, and ends as soon as the stores that hold it answer
    MARKED = "marked"


@dataclass(frozen=True, slots=True)
class Cancellation:
    """A job that was to be cancelled: what became of it, its state, and the worker that holds it."""

    job: str
    became: Became
    state: State
    worker: str | None

    @property
    def done(self) -> bool:
        """Return whether the job is cancelled, or can start no more."""
        return self.became is not Became.ENDED_BEFORE or self.state in (State.CANCELLED, State.EXPIRED)

    def to_json(self) -> dict[str, Any]:
        return {"id": self.job, "became": self.became.value, "state": self.state.value, "worker": self.worker}


def cancel(app: Celery, stores: Stores, jobs: Sequence[str], *, terminate: bool = False) -> Iterator[Cancellation]:
    """Cancel jobs, and yield what became of each.

    A job that a worker holds runs to its end, and no other attempt follows it; `terminate` ends its process. Raises
    `InvalidRequest` for unknown ids before anything is written, and `StoreUnavailable`.
    """
    ids = list(dict.fromkeys(check_job_id(job) for job in jobs))
    existing = _standing(stores, ids)
    unknown = [job for job in ids if job not in existing]
    if unknown:
        more = f" and {len(unknown) - SHOWN_UNKNOWN} more" if len(unknown) > SHOWN_UNKNOWN else ""
        named = f"{', '.join(unknown[:SHOWN_UNKNOWN])}{more}"
        advice = "Nothing was cancelled. `celery -A platform jobs` lists the newest jobs."
        raise InvalidRequest(f"there is no job {named}", value=unknown[0], advice=advice)
    return _cancel(app, stores, ids, existing, terminate)


def _cancel(
    app: Celery, stores: Stores, ids: Sequence[str], existing: Mapping[str, Standing], terminate: bool
) -> Iterator[Cancellation]:
    """Cancel jobs step by step, each by its state at its step: a job of a later step may have started meanwhile."""
    for start in range(0, len(ids), STEP):
        step = ids[start : start + STEP]
        # A row that went to the archive and was deleted there keeps its state.
        before = {**{job: existing[job] for job in step}, **_standing(stores, step)}
        active = [job for job in step if before[job].state not in FINAL]
        answers: Any = []
        if active:
            # Workers are always asked: a job that waits now may have started when they hear of it.
            options = {"reply": True, "timeout": ANSWER_WITHIN, "limit": _workers(stores)} if terminate else {}
            answers = app.control.revoke(active, terminate=terminate, **options) or []
        ending, cannot = _answered(answers)
        after = _standing(stores, step)
        for job in step:
            # A row that went to the archive meanwhile had ended before.
            now = after.get(job, before[job])
            yield Cancellation(job, _became(job, before[job], now, ending, cannot), now.state, now.worker)


def _became(job: str, before: Standing, now: Standing, ending: set[str], cannot: set[str]) -> Became:
    if before.state in FINAL:
        return Became.ENDED_BEFORE
    if job in cannot:
        return Became.CANNOT_TERMINATE
    if job in ending:
        return Became.TERMINATING
    if now.state in FINAL:
        return Became.CANCELLED if now.state is State.CANCELLED else Became.ENDED_BEFORE
    return Became.RUNS_ON if now.state in HOLDING else Became.MARKED


def _answered(answers: Sequence[Mapping[str, Any]]) -> tuple[set[str], set[str]]:
    """Return the jobs whose processes were told to end, and those that run in threads, by the workers' answers."""
    ending: set[str] = set()
    cannot: set[str] = set()
    for answer in answers:
        for reply in answer.values():
            if isinstance(reply, Mapping):
                ending |= set(reply.get("terminated") or ())
                cannot |= set(reply.get("cannot_terminate") or ())
    return ending, cannot


def matching(
    stores: Stores, *, task: str | None = None, group: str | None = None, state: str | None = None
) -> list[str]:
    """Return the jobs that have not ended and match all of these, oldest first. Raises `InvalidRequest`.

    `task`: a pattern, in which `*` stands for any characters. `group`: the id of a group, of a chord's header, or of
    the first task of a workflow.
    """
    chosen = None
    if state is not None:
        active = sorted({str(member) for member in State} - FINAL)
        if state not in active:
            advice = f"It must be one of {', '.join(active)}."
            raise InvalidRequest(f"state {show(state)} is not one that can be cancelled", value=state, advice=advice)
        chosen = State(state)
    with translated("nothing was cancelled: "), stores.engine.connect() as connection:
        return revocation.open_jobs(connection, task, group, chosen)


def _standing(stores: Stores, ids: Sequence[str]) -> dict[str, Standing]:
    """Return where jobs are, as the ledger has it for those that have not ended: their rows follow a moment later."""
    with translated(), stores.engine.connect() as connection:
        rows = revocation.standing(connection, ids)
    active = [job for job, row in rows.items() if row.state not in FINAL]
    events = stores.sending.ask(lambda ledger: [job_events.in_ledger(ledger.client, job) for job in active])
    for event in events or ():
        # An end counts where it is newer than the row: another process may have ended the job just now.
        if event is not None and (event.state not in FINAL or event.rank > rows[event.job].rank):
            rows[event.job] = Standing(event.state, event.worker, event.rank)
    return rows


def _workers(stores: Stores) -> int:
    """Return the number of workers that may answer."""
    with translated("nothing was cancelled: "), stores.engine.connect() as connection:
        return max(1, revocation.live_workers(connection))
