"""A task that kills its worker each time is identified as poison, and its neighbours succeed."""

from __future__ import annotations

import math

import pytest

from tests.faults.breaking import World
from tests.faults.watching import Oracle
from tests.fixtures.submitting import Submitter
from tests.fixtures.waiting import until

NORMAL = 200


@pytest.mark.long
def test_task_that_kills_workers_is_lost_after_three_and_others_succeed(
    world: World, submitter: Submitter, oracle: Oracle
) -> None:
    for name in ("a", "c"):
        world.start(name, ready=True)
        # Start the worker again after each death, as a supervisor does.
        world.leaving[name] = math.inf
    before = [oracle.send(submitter, seconds=0.02) for _ in range(NORMAL // 2)]
    poison = oracle.send(submitter, how="kill worker!", expected=["lost"])
    after = [oracle.send(submitter, seconds=0.02) for _ in range(NORMAL // 2)]
    deaths = 0

    def over() -> bool:
        nonlocal deaths
        for name, worker in world.workers.items():
            if not worker.alive:
                oracle.asked(worker)
                deaths += 1
                world.leaving[name] = 0.0
        world.tend()
        world.leaving.update(dict.fromkeys(world.workers, math.inf))
        return not oracle.open_jobs()

    until(over, lambda: f"all are over: {oracle.open_jobs()[:5]}", 120.0)
    oracle.whole_again("a task that kills its worker")
    oracle.assert_zeros()
    assert deaths <= 3
    assert submitter.outcomes(poison) == ["lost"] * 3
    assert all(submitter.row(job).state == "succeeded" for job in before + after)
