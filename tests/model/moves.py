"""Parts that all steps share: their type, and copies of a state with one change."""

from __future__ import annotations

from typing import Final

from tests.model.state import Faults, Job, State, Worker


class Violation(Exception):
    """A step that must not be possible; its text gives the reason."""


#: Name of the step, its job and worker (NOBODY if there is none), and the state after it.
Step = tuple[str, int, int, State]
#: Steps that need a fault. A state that only these steps leave is a dead end.
FAULTS: Final = frozenset(
    {
        "a worker crashes",
        "a worker is stopped",
        "an answer is lost",
        "a heartbeat's answer times out",
        "Redis comes back empty",
        "Redis comes back with its data",
        "an opener is overtaken",
        "a message is delivered again",
    }
)


def with_job(state: State, index: int, job: Job) -> State:
    jobs = list(state.jobs)
    jobs[index] = job
    return State(state.common, state.workers, tuple(jobs))


def with_worker(state: State, index: int, worker: Worker) -> State:
    both = (worker, state.workers[1]) if index == 0 else (state.workers[0], worker)
    return State(state.common, both, state.jobs)


def use(state: State, name: str) -> Faults | None:
    faults = state.common.faults
    left: int = getattr(faults, name)
    return faults._replace(**{name: left - 1}) if left else None


def is_open(state: State) -> bool:
    """Return True if scripts of the epoch that Postgres names are carried out."""
    return not state.common.cold and state.common.books == state.common.epoch


def set_named(both: tuple[bool, bool], index: int, value: bool) -> tuple[bool, bool]:
    return (value, both[1]) if index == 0 else (both[0], value)


def without_submissions(state: State) -> State:
    """Return the state without submissions on their way, which are refused when they come."""
    return state._replace(jobs=tuple(job._replace(submission=()) for job in state.jobs))
