"""`rate_limit` with workers: it holds for the whole cluster, and its waiting jobs take no room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from celery_capacity.platform.console.render import reasons
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.inspect.explain import explain
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.tasks import gated


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("rates"), gated.__name__) as running:
        for name in ("a", "b"):
            running.worker(name, cpus=4, pool="threads", ready=False)
        for process in running.processes:
            process.wait_for(" ready.")
        yield running


def test_two_workers_together_start_no_more_than_the_rate(submitter: Submitter) -> None:
    # The sender uses only the task's name. The workers have published the rate.
    jobs = [submitter.send(gated.often.name) for _ in range(12)]
    starts = sorted(submitter.ended(job).due_at for job in jobs)
    assert len(starts) == 12
    for number, at in enumerate(starts):
        # The bucket was empty after the first start, so in any number of seconds at most rate x seconds jobs start.
        assert number <= 20 * (at - starts[0]).total_seconds() + 1
    assert {submitter.row(job).worker for job in jobs} <= {"a", "b"}


def test_what_a_rate_holds_back_takes_no_room_and_says_so(platform: Platform, submitter: Submitter) -> None:
    first, second = submitter.send(gated.seldom.name, cpus=4), submitter.send(gated.seldom.name, cpus=4)
    assert submitter.ended(first).state == "succeeded"
    assert submitter.row(second).state == "scheduled"
    with platform.engine.connect() as connection:
        why = explain(platform.redis, connection, second)
    assert why is not None and "rate limit of its task is 1/h" in reasons(why)[0]
    assert submitter.allocated_cpus() == "0"
    # An operator of Celery changes the rate at run time, and every worker agrees.
    changed = platform.celery("control", "rate_limit", gated.seldom.name, "0")
    assert (changed.returncode, changed.stdout.count("OK")) == (0, 2), changed.stdout + changed.stderr
    assert submitter.ended(second).state == "succeeded"


def test_rate_set_at_run_time_holds_for_senders_that_do_not_know_it(submitter: Submitter) -> None:
    assert submitter.ended(submitter.send(gated.unlimited.name)).rated is False
    submitter.app.control.rate_limit(gated.unlimited.name, "1/h")
    first, second = submitter.send(gated.unlimited.name), submitter.send(gated.unlimited.name)
    assert submitter.ended(first).state == "succeeded"
    assert submitter.row(second).state == "scheduled"
    submitter.app.control.revoke(second)
    assert submitter.ended(second).state == "cancelled"
    submitter.app.control.rate_limit(gated.unlimited.name, None)
    assert submitter.ended(submitter.send(gated.unlimited.name)).state == "succeeded"
