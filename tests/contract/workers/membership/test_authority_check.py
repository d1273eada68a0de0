"""A worker that has nothing to decide asks nobody if it may. A job that comes to it is decided after a new answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.model.states import Store
from celery_capacity.workers.membership.authority_check import Confirmation
from tests.fixtures.stores.staged import Stage
from tests.fixtures.waiting import until

#: Seconds between two questions.
INTERVAL = 0.05


class Observed(Confirmation):
    """A confirmation that counts its questions."""

    asked = 0

    def ask(self) -> int:
        self.asked += 1
        return super().ask()


@pytest.fixture
def regained() -> threading.Event:
    return threading.Event()


@pytest.fixture
def confirmation(stage: Stage, regained: threading.Event) -> Iterator[Observed]:
    confirmation = Observed(stage.engine, INTERVAL, regained.set)
    confirmation.ask()
    yield confirmation
    confirmation.stop(0.0)
    until(lambda: not confirmation.is_alive(), "its thread has ended")


def test_confirmation_rests_while_there_is_nothing_to_decide(confirmation: Observed, regained: threading.Event) -> None:
    confirmation.idle = lambda: True
    confirmation.start()
    until(lambda: confirmation.resting, "it rests")
    asked = confirmation.asked
    until(lambda: not confirmation.may_admit, "its answer has run out")
    regained.wait(10 * INTERVAL)
    assert confirmation.asked == asked
    confirmation.needed()
    assert regained.wait(60)
    assert confirmation.may_admit


def test_confirmation_is_asked_for_while_there_is_something_to_decide(confirmation: Observed) -> None:
    confirmation.start()
    asked = confirmation.asked
    until(lambda: confirmation.asked >= asked + 5, "it is asked again and again")
    assert not confirmation.resting


def test_confirmation_does_not_rest_while_postgres_decides(confirmation: Observed, stage: Stage) -> None:
    stage.sql("UPDATE authority SET authority = 'postgres', changed_at = clock_timestamp()")
    confirmation.ask()
    confirmation.idle = lambda: True
    confirmation.start()
    asked = confirmation.asked
    until(lambda: confirmation.asked >= asked + 5, "it is asked again and again")


def test_heartbeat_in_postgres_brings_an_answer(confirmation: Observed, stage: Stage) -> None:
    until(lambda: not confirmation.may_admit, "its answer has run out")
    sent = time.monotonic()
    with stage.engine.connect() as connection:
        confirmation.hear(sent, read_authority(connection))
    assert confirmation.may_admit
    stage.sql("UPDATE authority SET epoch = epoch + 1")
    with stage.engine.connect() as connection:
        epochs: list[int] = []
        confirmation.on_epoch = lambda: epochs.append(confirmation.epoch)
        confirmation.hear(time.monotonic(), read_authority(connection))
    assert epochs == [confirmation.epoch]


def test_heartbeat_answers_with_the_authority_as_a_question_does(stage: Stage) -> None:
    stage.worker("a", cpus=1000)
    assert isinstance(stage.seen.authority, Store)
    with stage.engine.connect() as connection:
        assert replace(stage.seen, age=0.0) == replace(read_authority(connection), age=0.0)
