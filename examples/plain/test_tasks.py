"""Tests of a project: `pytest` in this folder. Tests with a worker need servers: `celery -A platform servers start`."""

import pytest
from celery import chord, group
from tasks import flaky, report, simulate


def test_a_task_is_a_function() -> None:
    assert simulate(5) == 10


def test_a_call_in_this_process_needs_no_servers() -> None:
    assert simulate.apply(args=[5]).get() == 10
    assert (simulate.s(5) | simulate.s()).apply().get() == 45
    assert flaky.apply().get() == 2


def test_eagerly_delay_calls_at_once(celery_app, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(celery_app.conf, "task_always_eager", True)
    assert simulate.delay(5).get() == 10
    assert group(simulate.s(n) for n in (2, 3)).apply_async(cpus=8).get() == [1, 3]


@pytest.mark.parametrize("again", [1, 2])
def test_on_a_worker_of_this_test_alone(celery_worker, again: int) -> None:
    assert simulate.delay(5).get(timeout=20) == 10
    assert flaky.delay().get(timeout=20) == 2


def test_on_the_worker_of_all_tests(celery_session_worker) -> None:
    assert chord([simulate.s(n) for n in (2, 3)], report.s()).delay().get(timeout=20) == "2 runs, 4 in all"
