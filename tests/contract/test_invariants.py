"""The check after every test: damage fails a test that does not name it, and so does a mark without damage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from tests.fixtures.stores.invariants import faults_of_stores, is_known, judge
from tests.fixtures.stores.staged import Stage

#: Damage -> (the check that sees it, how it is done). The worker `a` has four CPUs, and runs a job of one.
DAMAGE: Final[dict[str, tuple[str, Callable[[Stage], Any]]]] = {
    "an overbooked book": ("I1", lambda stage: stage.redis.hset(keys.book("a"), "a.cpus", 5000)),
    "two open attempts": ("I4", lambda stage: stage.sql(SECOND_ATTEMPT)),
    "a job that Postgres lacks": ("I6", lambda stage: stage.sql("UPDATE jobs SET state = 'accepted'")),
    "an unknown key": ("keys", lambda stage: stage.redis.set("ledgers", "1")),
}
SECOND_ATTEMPT: Final = (
    "INSERT INTO attempts (job_id, epoch, attempt, worker, incarnation)"
    " SELECT id, epoch, attempt + 1, worker, incarnation FROM jobs"
)


class Marked:
    """A test with this mark, or with none."""

    def __init__(self, mark: pytest.MarkDecorator | None) -> None:
        self.mark = mark.mark if mark else None

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.mark


def judged(faults: list[str], mark: pytest.MarkDecorator | None = None) -> None:
    judge(Marked(mark), faults)  # type: ignore[arg-type]


@pytest.mark.leaves("I1", "I4", "I6", "keys", because="each case does one kind of damage", sometimes=True)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_fails_a_test_that_does_not_name_it(
    stage: Stage, settings: Settings, redis_url: str, database_url: str, damage: str
) -> None:
    name, do = DAMAGE[damage]
    stage.worker("a", cpus=4000)
    stage.start(stage.submit(cpus=1000))
    servers = {"redis_url": redis_url, "database_url": database_url}
    assert faults_of_stores(servers) == []
    do(stage)
    faults = faults_of_stores(servers)
    with pytest.raises(AssertionError, match=rf"the books are wrong after the test:\s+{name}: "):
        judged(faults)
    broken = {fault.partition(":")[0] for fault in faults}
    judged(faults, pytest.mark.leaves(*broken, because="it is damaged"))


def test_mark_without_its_damage_fails_its_test() -> None:
    with pytest.raises(AssertionError, match="does not leave I1"):
        judged([], pytest.mark.leaves("I1", because="it was so once"))
    judged([], pytest.mark.leaves("I1", because="it is so now and then", sometimes=True))


def test_mark_names_invariants_and_a_reason() -> None:
    with pytest.raises(AssertionError, match="names invariants"):
        judged([], pytest.mark.leaves("I9", because="nobody knows it"))
    with pytest.raises(AssertionError, match="says why"):
        judged([], pytest.mark.leaves("I1", because=""))


@pytest.mark.parametrize(
    ("name", "working", "known"),
    [
        ("ledger:book:a", True, True),
        ("ledger:probe", False, True),
        ("ledger:probes", True, False),
        ("worker.a.0123", False, True),
        ("gate", True, True),
        ("gate", False, False),
    ],
)
def test_key_is_of_a_known_family(name: str, working: bool, known: bool) -> None:
    assert is_known(name, working) is known
