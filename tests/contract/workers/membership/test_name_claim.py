"""The right to a worker's name, asked of real stores: every other incarnation is challenged, and waited for."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from celery_capacity.routing.config import process_identity
from celery_capacity.routing.config.process_identity import PidSpace
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import NameTaken
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.workers.membership.name_claim import NameClaim
from celery_capacity.workers.process.identity import Identity
from celery_capacity.workers.supervision.lock_file import LockFile
from tests.fixtures.stores.books import VIEW
from tests.fixtures.stores.staged import Stage

#: Another boot of a machine of the same id: a clone, or the same machine before it booted. Nobody can tell which.
ELSEWHERE = PidSpace(process_identity.machine_id(), "another boot:pid:[1]")
#: Another container of this machine: the same boot, and pids of its own.
ANOTHER_CONTAINER = PidSpace("", f"{process_identity.boot_id().partition(':')[0]}:pid:[1]")


@dataclass
class Namesakes:
    """The worker `a` that wants the name, and the other incarnations of the name in the stores."""

    stage: Stage
    claim: NameClaim
    ledger: Ledger

    def registers(
        self, life: str = "other", pid_space: PidSpace = ELSEWHERE, pid: int = 7, status: str = "ready"
    ) -> None:
        """Note another incarnation in both stores."""
        self.stage.worker("a", life=life, cpus=1000)
        self.stage.sql(
            "UPDATE workers SET machine_id = :machine, boot_id = :boot, pid = :pid, start_ticks = :ticks,"
            " status = :status WHERE incarnation = :life",
            machine=pid_space.machine,
            boot=pid_space.boot,
            pid=pid,
            status=status,
            life=f"a-{life}",
            ticks=process_identity.start_ticks(pid),
        )

    def renews(self, life: str = "other") -> None:
        assert self.ledger.renew("a", f"a-{life}", VIEW, [], 3).known

    def lease_ends(self) -> None:
        self.stage.redis.hset(keys.book("a"), "lease", self.ledger.now_ms() - 1)

    def take(self, challenge: Callable[[], None] = lambda: None) -> int:
        """Take the name, and return how often the others were challenged before it was free."""
        challenges = 0

        def count() -> None:
            nonlocal challenges
            challenges += 1
            challenge()

        self.claim.take(count)
        return challenges


@pytest.fixture
def others(engine: Engine, settings: Settings) -> Iterator[Namesakes]:
    stage = Stage(engine, settings)
    yield Namesakes(stage, NameClaim(stage.engine, stage.ledger, Identity("a")), stage.ledger)
    stage.close()


def test_name_of_nobody_is_free_at_once(others: Namesakes) -> None:
    assert others.take() == 0


def test_live_incarnation_of_another_boot_keeps_its_name(others: Namesakes) -> None:
    others.registers()
    with pytest.raises(NameTaken, match="pid 7"):
        others.take(others.renews)


def test_lease_that_ran_out_is_challenged_too(others: Namesakes) -> None:
    """Its holder may have had no way to the store for all that time."""
    others.registers()
    others.lease_ends()
    with pytest.raises(NameTaken):
        others.take(others.renews)


def test_silent_incarnation_of_another_boot_is_given_up_after_its_lease(others: Namesakes) -> None:
    others.registers()
    assert others.take() == 1
    lease = int(others.stage.redis.hget(keys.book("a"), "lease") or 0)
    assert others.ledger.now_ms() >= lease
    # It was silent for long enough: it is not waited for once more, unless it speaks.
    assert others.take() == 0
    others.renews()
    with pytest.raises(NameTaken):
        others.take(others.renews)


@pytest.mark.leaves("I6", because="the book was lost and the index was not")
def test_incarnation_that_only_postgres_knows_is_waited_for(others: Namesakes) -> None:
    """The ledger was emptied, and its workers have not registered yet."""
    others.registers()
    others.stage.redis.delete(keys.book("a"))

    def seen() -> None:
        others.stage.sql("UPDATE workers SET seen_at = clock_timestamp()")

    with pytest.raises(NameTaken):
        others.take(seen)


def test_clock_of_postgres_set_forward_gives_nobody_up_unchallenged(others: Namesakes) -> None:
    others.registers()
    others.stage.redis.delete(keys.book("a"))
    others.stage.sql("UPDATE workers SET seen_at = seen_at - interval '1 hour'")
    with pytest.raises(NameTaken):
        others.take(lambda: others.registers())


def test_clock_of_the_ledger_that_is_set_back_is_not_waited_for(others: Namesakes) -> None:
    """A lease ends in an hour by the clock of now, though it was to end within the TTL."""
    others.registers()
    others.stage.redis.hset(keys.book("a"), "lease", others.ledger.now_ms() + 3_600_000)
    assert others.take() == 1


def test_incarnation_that_registers_meanwhile_has_the_name(others: Namesakes) -> None:
    others.registers()

    def another_takes_over() -> None:
        others.lease_ends()
        others.registers("third")

    with pytest.raises(NameTaken):
        others.take(another_takes_over)


def test_dead_process_of_this_machine_is_not_waited_for(others: Namesakes) -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    others.registers(pid_space=process_identity.pid_space(), pid=ended.pid)
    assert others.take() == 0


@pytest.fixture
def locks(others: Namesakes, tmp_path: Path) -> LockFile:
    """Return the lock file of the incarnation `a-other`, which ran in another container of this machine."""
    others.claim.lock = LockFile(tmp_path, others.claim._identity.incarnation, ANOTHER_CONTAINER.boot)
    others.registers(pid_space=ANOTHER_CONTAINER)
    return LockFile(tmp_path, "a-other", ANOTHER_CONTAINER.boot)


def test_incarnation_that_gave_its_lock_up_is_not_waited_for(others: Namesakes, locks: LockFile) -> None:
    locks.hold()
    os.close(locks._descriptor or 0)
    assert others.take() == 0


def test_incarnation_that_holds_its_lock_keeps_its_name(others: Namesakes, locks: LockFile) -> None:
    """A second worker with a copied environment finds the lock taken."""
    locks.hold()
    with pytest.raises(NameTaken):
        others.take(others.renews)


def test_incarnation_without_a_lock_is_challenged(others: Namesakes, locks: LockFile) -> None:
    with pytest.raises(NameTaken):
        others.take(others.renews)


def test_incarnation_of_a_release_that_noted_no_machine_is_challenged(others: Namesakes) -> None:
    others.registers(pid_space=process_identity.pid_space(), pid=2**22 + 1)
    others.stage.sql("UPDATE workers SET machine_id = NULL")
    with pytest.raises(NameTaken):
        others.take(others.renews)


def test_postgres_alone_is_asked_where_the_ledger_is_gone(others: Namesakes) -> None:
    others.registers()
    others.lease_ends()
    others.claim.take(None)
    with others.stage.engine.connect() as connection:
        age = connection.execute(text("SELECT extract(epoch FROM clock_timestamp() - seen_at) FROM workers")).scalar()
    assert age is not None and age >= others.stage.settings.worker_ttl
