"""Sources of expected run times for a simulation: exact, learned from the jobs that ended before, or none."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from celery_capacity.routing.simulation.jobs import Submission

#: Run times of a task that are remembered: the last ones, so that a changed task is learned anew.
REMEMBERED: Final = 16
#: Run times of one task and request below which nothing is said.
FEWEST: Final = 2
#: Part of the remembered run times that an expectation is not below. A job that ends early delays nobody.
QUANTILE: Final = 0.75


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
    """Each job has the upper quartile of the last run times of its task and request, of its task, or of all jobs."""

    def __init__(self) -> None:
        self._times: dict[tuple[str, str], deque[int]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def expected(self, submission: Submission) -> int:
        """Return the upper quartile of the most alike jobs of which enough have ended."""
        for key in _keys(submission):
            times = self._times.get(key, ())
            if len(times) >= FEWEST:
                return sorted(times)[min(int(QUANTILE * len(times)), len(times) - 1)]
        return 0

    def learn(self, submission: Submission) -> None:
        """Remember a run time."""
        for key in _keys(submission):
            self._times[key].append(submission.run)


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


def _keys(submission: Submission) -> tuple[tuple[str, str], ...]:
    return (submission.task, submission.request.shape), (submission.task, ""), ("", "")


#: Sources by the word that a person chooses.
SOURCES: Final[dict[str, Callable[[], Expectations]]] = {
    "exact": Exact,
    "learned": Learned,
    "recorded": Recorded,
    "none": Unknown,
}
