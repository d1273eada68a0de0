"""The words for the jobs that an end waits for."""

from __future__ import annotations

import pytest

from celery_capacity.platform.processes.running_jobs import RunningJob, duration, summary


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (185, "3 min 5 s"), (7810, "2 h 10 min")]
)
def test_a_duration_shows_that_time_passes(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_first_jobs_are_named_and_the_others_counted() -> None:
    jobs = [RunningJob(f"{number}bcdef01-2345", "tasks.render", "gpu", 60.0 * number) for number in range(1, 6)]
    assert summary(jobs[:1]) == ("Waiting for 1 running job:", "tasks.render 1bcdef01 on gpu (1 min 0 s)")
    kind, detail = summary(jobs)
    assert kind == "Waiting for 5 running jobs:"
    assert detail.endswith("tasks.render 3bcdef01 on gpu (3 min 0 s), 2 more")
