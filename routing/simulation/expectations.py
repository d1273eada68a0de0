"""Sources of expected run times for a simulation: exact, learned from the jobs that ended before, or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from celery_capacity.routing.model.expected import class_number
from celery_capacity.routing.policy.learned_times import Histogram, Kind
from celery_capacity.routing.simulation.jobs import Submission


class Expectations(Protocol):
    """Source of expected run times."""

    def expected(self, submission: Submission) -> int:
        """Return the expected run time in milliseconds at the time of the submission; 0 where it is unknown."""

    def learn(self, submission: Submission) -> None:
        """Take note that a job has ended."""


class Unknown:
    """No job has an expected run time."""

    def expected(self, submission: Submission) -> int:
        """Return 0."""
        return 0

    def learn(self, submission: Submission) -> None:
        """Forget it."""


class Exact(Unknown):
    """Each job has its own run time as its expected one."""

    def expected(self, submission: Submission) -> int:
        """Return the run time."""
        return submission.run


class Recorded(Unknown):
    """Each job has the expected time that it had when it came."""

    def expected(self, submission: Submission) -> int:
        """Return the recorded time."""
        return submission.expected


class Learned:
    """Each job has the time that the platform has learned by then. An end is known at once, without a duty's delay."""

    def __init__(self) -> None:
        self._runs: dict[Kind, Histogram] = defaultdict(Histogram)

    def expected(self, submission: Submission) -> int:
        """Return the learned time of the task and request of a job."""
        runs = self._runs.get(_kind(submission))
        return runs.expected_ms if runs is not None else 0

    def learn(self, submission: Submission) -> None:
        """Count a run."""
        self._runs[_kind(submission)].add({class_number(submission.run): 1})


@dataclass(frozen=True)
class Counted:
    """Source of expected run times that says when a job has ended."""

    source: Expectations
    ended: Callable[[], object]

    def expected(self, submission: Submission) -> int:
        """Return the expected run time of the source."""
        return self.source.expected(submission)

    def learn(self, submission: Submission) -> None:
        """Tell the source and the observer."""
        self.source.learn(submission)
        self.ended()


def _kind(submission: Submission) -> Kind:
    return submission.task, submission.request.shape


#: Sources by the word that a person chooses.
SOURCES: Final[dict[str, Callable[[], Expectations]]] = {
    "exact": Exact,
    "learned": Learned,
    "recorded": Recorded,
    "none": Unknown,
}
