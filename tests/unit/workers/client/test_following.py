"""Waits for jobs at their limits: a time-out that is over at once, very long, infinite or no number."""

from __future__ import annotations

import asyncio
import math
import threading
from typing import Any

import pytest

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.inspect.job_events import JobEvent
from celery_capacity.routing.model.states import State
from celery_capacity.workers.client import following


class JobWatcher:
    """A watcher that tells of the first look after `delay` seconds, and of nothing else."""

    def __init__(self, delay: float) -> None:
        self._delay = delay

    def watch(self, _: str, callback: Any) -> None:
        threading.Timer(self._delay, callback, (None,)).start()

    def unwatch(self, _: str, __: Any) -> None:
        pass


class Stores:
    """Stores in front of which only the watcher is asked."""

    def __init__(self, delay: float = 0.0) -> None:
        self.watcher = JobWatcher(delay)


@pytest.fixture(autouse=True)
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the jobs that were looked at. A job whose name begins with "ended" has ended.

    A "late" job has ended, but its first look saw only an older row, since the ledger was left alone.
    """
    jobs: list[str] = []
    monkeypatch.setattr(following, "LOOK_AGAIN", 0.01)

    def look(_: Any, job: str) -> following.Look:
        jobs.append(job)
        if job.startswith("late") and jobs.count(job) == 1:
            return following.Look(JobEvent(job, State.RUNNING, 1, "a", rank=(1, 1, 1)), sure=False)
        ended = job.startswith(("ended", "late"))
        state = State.SUCCEEDED if ended else State.RUNNING
        return following.Look(JobEvent(job, state, 1, "a", rank=(1, 1, 2)), sure=True)

    monkeypatch.setattr(following, "look", look)
    return jobs


def follow(*jobs: str, timeout: float, delay: float = 0.0) -> Any:
    return following.follow(Stores(delay), jobs, timeout)  # type: ignore[arg-type]


def test_time_out_of_nothing_looks_at_each_job_once(looks: list[str]) -> None:
    events = follow("ended-1", "active", timeout=0, delay=0.2)
    assert [next(events).job, next(events).job] == ["ended-1", "active"]
    with pytest.raises(TimeoutError, match="1 of 2 jobs"):
        next(events)
    assert looks == ["ended-1", "active"]


def test_time_out_of_nothing_is_none_where_all_have_ended() -> None:
    assert [event.state for event in follow("ended-1", "ended-2", timeout=0, delay=0.2)] == [State.SUCCEEDED] * 2


@pytest.mark.parametrize("timeout", [3_000_000, 1e300])
def test_wait_may_be_longer_than_the_operating_system_s(timeout: float) -> None:
    assert [event.final for event in follow("ended", timeout=timeout, delay=0.1)] == [True]


@pytest.mark.parametrize("timeout", [math.inf, math.nan])
def test_time_out_must_be_finite(timeout: float) -> None:
    with pytest.raises(InvalidRequest, match=f"timeout={timeout} is not valid"):
        next(follow("ended", timeout=timeout))


def test_follow_looks_again_after_an_unsure_first_look(looks: list[str]) -> None:
    seen = [(event.job, event.state) for event in follow("late-1", "late-2", timeout=120)]
    assert sorted(seen) == [(f"late-{n}", state) for n in (1, 2) for state in (State.RUNNING, State.SUCCEEDED)]
    assert sorted(looks) == ["late-1", "late-1", "late-2", "late-2"]


def test_event_loop_looks_again_after_an_unsure_look(looks: list[str]) -> None:
    async def states() -> list[State]:
        events = following.follow_async(Stores(), "late")  # type: ignore[arg-type]
        return [event.state async for event in events]

    assert asyncio.run(asyncio.wait_for(states(), 120)) == [State.RUNNING, State.SUCCEEDED]
    assert looks == ["late", "late"]


def test_jobs_whose_ledger_is_away_are_looked_at_at_most_once_at_a_time() -> None:
    trail = following.Trail()
    pauses = []
    for _ in range(12):
        pauses.append(trail.put_off())
        assert trail.put_off() is None
        trail.resume()
    assert pauses[:4] == [following.LOOK_AGAIN * 2**n for n in range(4)]
    assert pauses[-2:] == [following.LOOK_AGAIN_AT_MOST] * 2
