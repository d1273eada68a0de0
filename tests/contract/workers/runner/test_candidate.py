"""The lease of the runner: a single holder at a time in either store, and a larger number for each new holder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy import text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger import election, keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.election import Elected
from celery_capacity.routing.model.states import Store
from celery_capacity.workers.runner.candidate import Candidate
from tests.fixtures.stores.staged import Stage
from tests.fixtures.waiting import until

TERM = 60.0


@dataclass(frozen=True)
class Kept:
    """A store that keeps the lease, and how to ask for the lease there."""

    elect: Callable[..., Elected]
    resign: Callable[[str, int], object]
    #: Moves the end of the lease by so many seconds, as time would.
    move: Callable[[float], object]


@pytest.fixture(params=["ledger", "postgres"])
def kept(stage: Stage, request: pytest.FixtureRequest) -> Kept:
    def connected(action: Callable[..., Any]) -> Callable[..., Any]:
        def act(*values: Any) -> Any:
            with stage.engine.connect() as connection:
                return action(connection, *values)

        return act

    if request.param == "postgres":
        move = "UPDATE runner SET until = until + make_interval(secs => :seconds)"
        return Kept(
            connected(election.elect), connected(election.resign), lambda seconds: stage.sql(move, seconds=seconds)
        )
    return Kept(
        stage.ledger.elect,
        lambda caller, fence: stage.ledger.elect(caller, fence, 0.0),
        lambda seconds: stage.redis.hincrby(keys.RUNNER, "until", round(seconds * 1000)),
    )


def test_worker_of_another_database_gets_no_lease(stage: Stage, settings: Settings) -> None:
    """A worker whose own Redis is gone may meet another platform's books at its address."""
    stage.redis.hset(keys.EPOCH, "database", "ours")
    foreign = Ledger(settings, stage.redis)
    foreign.database = "theirs"
    assert foreign.elect("stranger", 0, TERM).fence == 0
    ours = Ledger(settings, stage.redis)
    ours.database = "ours"
    assert ours.elect("a", 0, TERM).fence == 1
    # The lease that it took before the books were there is not renewed.
    stage.redis.hset(keys.RUNNER, mapping={"incarnation": "stranger", "fence": 2})
    assert foreign.elect("stranger", 2, TERM).fence == 0


def test_one_of_all_has_the_lease_and_keeps_it(kept: Kept) -> None:
    assert kept.elect("a", 0, TERM).fence == 1
    assert kept.elect("b", 0, TERM).fence == 0
    assert kept.elect("a", 1, TERM).fence == 1
    # An incarnation that forgot its number is a stranger, and so is one that knows another's.
    assert kept.elect("a", 0, TERM).fence == 0
    assert kept.elect("b", 1, TERM).fence == 0


def test_another_has_it_once_it_ran_out_and_the_old_holder_is_refused(kept: Kept) -> None:
    assert kept.elect("a", 0, TERM).fence == 1
    kept.move(-TERM)
    assert kept.elect("b", 0, TERM).fence == 2
    assert kept.elect("a", 1, TERM).fence == 0
    kept.resign("a", 1)
    assert kept.elect("c", 0, TERM).fence == 0


def test_a_holder_that_comes_late_goes_on_where_nobody_took_over(kept: Kept) -> None:
    assert kept.elect("a", 0, TERM).fence == 1
    kept.move(-2 * TERM)
    assert kept.elect("a", 1, TERM).fence == 1


def test_a_lease_that_is_given_back_is_free_at_once(kept: Kept) -> None:
    assert kept.elect("a", 0, TERM).fence == 1
    kept.resign("a", 1)
    assert kept.elect("b", 0, TERM).fence == 2


def test_a_clock_that_is_set_back_keeps_nobody_out(kept: Kept) -> None:
    assert kept.elect("a", 0, TERM).fence == 1
    kept.move(3600.0)
    assert kept.elect("b", 0, TERM).fence == 2


def test_a_number_grows_though_the_store_has_forgotten_it(kept: Kept, stage: Stage) -> None:
    for caller, fence in (("a", 0), ("b", 0), ("c", 0)):
        kept.elect(caller, fence, TERM)
        kept.move(-2 * TERM)
    stage.redis.delete(keys.RUNNER)
    stage.sql("DELETE FROM runner")
    assert kept.elect("c", 3, TERM).fence == 4


def test_requested_duty_comes_to_the_holder_once(stage: Stage) -> None:
    elect = stage.ledger.elect
    elect("a", 0, TERM)
    assert elect("b", 0, TERM, ["suspicion"]).fence == 0
    assert elect("c", 0, TERM, ["suspicion", "sweep"]).fence == 0
    assert set(elect("a", 1, TERM).asked) == {"suspicion", "sweep"}
    assert elect("a", 1, TERM).asked == ()


def test_counts_go_with_a_look_at_the_lease_and_wait_for_the_ledger(
    stage: Stage, candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate, other, *_ = candidates
    for what in ("duty.due.done", "duty.due.done", "duty.lapse.failed"):
        candidate.ledger.tally.add(what)
    with monkeypatch.context() as away:
        away.setattr(stage.ledger, "_calls", Mock(side_effect=StoreUnavailable("by the test")))
        with pytest.raises(StoreUnavailable):
            candidate._stand()
    candidate.ledger.tally.add("duty.due.done")
    candidate._stand()
    candidate._stand()
    other.ledger.tally.add("duty.outbox.done")
    other._stand()
    assert not other.holds(), "a worker that does no duties counts what it does for itself"
    candidate.ledger.tally.add("duty.stream.left")
    candidate._resign()
    counters: Any = stage.redis.hgetall(keys.COUNTERS)
    assert {name: number for name, number in counters.items() if name.startswith(b"duty.")} == {
        b"duty.due.done": b"3",
        b"duty.lapse.failed": b"1",
        b"duty.outbox.done": b"1",
        b"duty.stream.left": b"1",
    }


@pytest.fixture
def candidates(stage: Stage, workers_settings: Settings) -> Iterator[list[Candidate]]:
    made = [
        Candidate(stage.engine, stage.ledger, name, lambda: Store.LEDGER, lambda: None, lambda _: None)
        for name in "abcd"
    ]
    yield made
    for candidate in made:
        candidate.stop(10.0)


@pytest.fixture
def workers_settings(settings: Settings) -> Settings:
    return settings


def test_candidates_follow_each_other(candidates: list[Candidate]) -> None:
    for candidate in candidates:
        candidate.start()
    left = list(candidates)
    while left:
        (holder,) = until(lambda: [candidate for candidate in left if candidate.holds()], "one is elected")
        holder.stop(10.0)
        assert not holder.holds()
        left.remove(holder)


def test_a_holder_that_was_stopped_knows_that_its_lease_ran_out(stage: Stage, candidates: list[Candidate]) -> None:
    first, second, *_ = candidates
    first._stand()
    assert first.holds()
    assert first.holds(Store.LEDGER)
    assert not first.holds(Store.POSTGRES)
    first._until -= stage.settings.runner_term
    assert not first.holds(), "by its own clock, before it asks anybody"
    stage.redis.hincrby(keys.RUNNER, "until", -60_000)
    second._stand()
    first._stand()
    assert second.holds()
    assert not first.holds()


def test_the_authority_changes_and_the_lease_is_won_anew(stage: Stage) -> None:
    authority = [Store.LEDGER]
    changes: list[bool] = []
    candidate = Candidate(
        stage.engine, stage.ledger, "a", lambda: authority[0], lambda: changes.append(candidate.holds()), lambda _: None
    )
    candidate._stand()
    assert candidate.holds(Store.LEDGER)
    authority[0] = Store.POSTGRES
    candidate._stand()
    assert candidate.holds(Store.POSTGRES)
    assert not candidate.holds(Store.LEDGER)
    with stage.engine.connect() as connection:
        assert connection.execute(text("SELECT incarnation, fence FROM runner")).one() == ("a", 1)
    assert changes == [True, False, True]
