"""The worker's own count."""

from __future__ import annotations

import threading
from typing import Any

from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.process.holdings import Holding, Holdings

ONE = Request.of({"cpus": 1000})
FIRST = Token(1, 1)
TWO = Request.of({"cpus": 2000})


def holding(job: str, request: Request = ONE, token: Token = FIRST) -> Holding:
    return Holding(job, token, request, "nonce")


def holdings(cpus: int, slots: int = 9) -> Holdings:
    return Holdings({"cpus": cpus, "slots": slots})


def test_jobs_are_taken_in_their_order_while_they_fit_beside_what_runs() -> None:
    held = holdings(3000)
    held.add(holding("running"))
    assert held.admits({"a": ONE, "b": TWO, "c": ONE}) == {"a", "c"}


def test_a_body_that_is_over_makes_room_before_its_release_is_answered() -> None:
    held = holdings(1000)
    held.add(holding("over"))
    assert held.admits({"next": ONE}) == set()
    assert held.end("over", Token(1, 1))
    assert held.admits({"next": ONE}) == {"next"}
    assert held.jobs() == ["over"], "the heartbeat names it until the release was answered"
    assert [holding_.job for holding_ in held.running()] == []


def test_only_the_first_end_of_an_attempt_counts() -> None:
    held = holdings(1000)
    held.add(holding("job"))
    assert held.end("job", Token(1, 1))
    assert not held.end("job", Token(1, 1))
    assert not held.end("job", Token(1, 2))
    assert not held.end("stranger", Token(1, 1))


def test_attempt_without_its_lease_counts_beside_a_newer_one_of_its_job() -> None:
    held = holdings(2000)
    held.add(holding("job"))
    held.add(holding("job", token=Token(2, 2)))
    assert held.admits({"next": ONE}) == set()
    assert held.jobs() == ["job"]
    assert held.end("job", Token(2, 2))
    removed = held.remove("job", Token(2, 2))
    assert removed is not None
    assert removed.token == Token(2, 2)
    assert [holding_.token for holding_ in held.running()] == [Token(1, 1)]


def test_a_capacity_that_shrank_below_what_runs_admits_nothing() -> None:
    held = holdings(4000)
    held.add(holding("job", TWO))
    held.capacity = {"cpus": 1000, "slots": 9}
    assert held.admits({"free": Request.of({"cpus": 0})}) == set()


def test_lost_lease_of_one_attempt_costs_no_other_of_its_job() -> None:
    held = holdings(3000)
    held.capacity = {"cpus": 3000}
    for token in (Token(1, 1), Token(1, 2)):
        held.add(holding("job", token=token))
    held.disown({("job", Token(1, 1)), ("job", Token(9, 9))})
    assert held.left_of(Capacity.of({"cpus": 3000})).get("cpus") == 2000


def test_signal_in_the_middle_of_a_step_may_end_an_attempt() -> None:
    """Celery ends running jobs in the handler of a QUIT, in the main thread, which may hold the lock just then."""

    class Interrupted(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            if not ends:
                ends.append(True)
                ends.append(held.end("running", FIRST))
            return super().get(key, default)

    ends: list[bool] = []
    held = holdings(2000)
    for job in ("running", "next"):
        held.add(holding(job))
    held._held = Interrupted(held._held)
    main = threading.Thread(target=held.start, args=("next", FIRST), daemon=True)
    main.start()
    main.join(60)
    assert not main.is_alive()
    assert (ends, [holding_.job for holding_ in held.running()]) == ([True, True], ["next"])
