"""Which ends of a child lead to a restart, and after which pause."""

from __future__ import annotations

import signal

import pytest

from celery_capacity.platform.processes.restarts import MAX_FAILURES, STEADY, after_end
from celery_capacity.workers.process.exit_codes import Exit


def pause(
    code: int, failures: int = 0, lived: float = 1.0, was_ready: bool = True, worker: bool = True
) -> float | None:
    return after_end(code, lived=lived, was_ready=was_ready, failures=failures, worker=worker).pause


def test_pauses_grow_until_a_child_is_given_up() -> None:
    pauses, failures = [], 0
    for _ in range(MAX_FAILURES + 1):
        verdict = after_end(-signal.SIGKILL, lived=1.0, was_ready=True, failures=failures, worker=True)
        pauses.append(verdict.pause)
        failures = verdict.failures
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, None]
    assert "ended 6 times in a row" in verdict.text


def test_a_steady_child_begins_anew() -> None:
    verdict = after_end(1, lived=STEADY, was_ready=True, failures=MAX_FAILURES, worker=True)
    assert (verdict.pause, verdict.failures) == (1.0, 1)


@pytest.mark.parametrize("code", [Exit.OK, Exit.USAGE, Exit.CONFIGURATION])
def test_a_restart_that_cannot_help_is_left_out(code: Exit) -> None:
    assert pause(code) is None


def test_a_name_that_is_taken_concerns_workers_alone() -> None:
    assert pause(Exit.UNAVAILABLE) is None
    assert pause(Exit.UNAVAILABLE, worker=False) == 1.0


def test_a_child_that_was_never_ready_is_not_started_again() -> None:
    assert pause(Exit.FAILED, was_ready=False) is None
    # Killed from outside, or a restart that came too early: the next may help.
    assert pause(-signal.SIGKILL, was_ready=False) == 1.0
    assert pause(Exit.FAILED, was_ready=False, failures=2) == 4.0


def test_an_unknown_code_is_a_failure_like_others() -> None:
    assert pause(77) == 1.0
