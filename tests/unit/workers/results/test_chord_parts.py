"""A part of a chord that takes long concerns its own chord alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any
from unittest import mock

import pytest
from celery import Celery

from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.outbox import Outbox, parse
from celery_capacity.routing.model.states import Step
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.store.job_transitions import Transition
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.results import chord_parts as module
from celery_capacity.workers.results.backends import CarriedResults
from celery_capacity.workers.results.chord_parts import ChordPart, ChordParts
from celery_capacity.workers.results.deliver import Delivery, key_of

PATIENCE = 60.0


@pytest.fixture(autouse=True)
def _soon_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WITHIN", 0.2)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


class Chords:
    """Parts that are delivered to nobody.

    `after`: the parts that came through late, each with its error.
    """

    def __init__(self) -> None:
        self.parts = ChordParts("life")
        self.delivered: list[str] = []
        self.after: SimpleQueue[tuple[str, Exception | None]] = SimpleQueue()

    def part(self, name: str, does: Callable[[], Any] = lambda: None, *, remembered: bool = False) -> ChordPart:
        def deliver() -> None:
            self.delivered.append(name)
            does()

        def afterwards(error: Exception | None) -> None:
            self.after.put((name, error))

        return ChordPart(f"job {name}", f"chord {name}", name, deliver, afterwards, remembered)

    def bring(self, *parts: ChordPart) -> list[str]:
        """Return the fate of each part, as it was known when the part was yielded."""
        return [_fate(part) for part in self.parts.deliver(parts)]


def _fate(part: ChordPart) -> str:
    return "late" if part.late else "done" if part.done else f"failed: {part.error}" if part.error else "left"


@pytest.fixture
def chords() -> Chords:
    return Chords()


def _fails() -> None:
    raise ConnectionError("away")


def test_a_part_that_takes_long_keeps_back_no_other(chords: Chords, gate: threading.Event) -> None:
    fates = chords.bring(chords.part("a"), chords.part("b", gate.wait), chords.part("c"), chords.part("d"))
    assert fates == ["done", "late", "done", "done"]
    assert chords.bring(chords.part("e")) == ["done"]
    assert chords.after.empty()
    gate.set()
    assert chords.after.get(timeout=PATIENCE) == ("b", None)
    assert chords.delivered == ["a", "b", "c", "d", "e"]


def test_a_part_that_is_under_way_is_not_delivered_by_another_one(chords: Chords, gate: threading.Event) -> None:
    assert chords.bring(chords.part("a", gate.wait, remembered=True)) == ["late"]
    assert chords.parts.is_under_way("a")
    assert chords.bring(chords.part("a"), chords.part("b")) == ["late", "done"]
    gate.set()
    assert chords.after.get(timeout=PATIENCE) == ("a", None)
    assert chords.after.empty()
    with chords.parts._changed:
        assert chords.parts._changed.wait_for(lambda: not chords.parts.is_under_way("a"), PATIENCE)
    # The rest that it left may stand in a row all the same.
    assert chords.bring(chords.part("a")) == ["done"]
    assert chords.delivered == ["a", "b"]


def test_where_the_backend_is_away_the_others_are_left(chords: Chords) -> None:
    assert chords.bring(chords.part("a", _fails), chords.part("b")) == ["failed: away", "left"]
    assert chords.bring(chords.part("a"), chords.part("b")) == ["done", "done"]
    assert chords.delivered == ["a", "a", "b"]


def test_late_part_reports_its_error(chords: Chords, gate: threading.Event) -> None:
    def fail() -> None:
        gate.wait()
        _fails()

    assert chords.bring(chords.part("a", fail)) == ["late"]
    gate.set()
    name, error = chords.after.get(timeout=PATIENCE)
    assert (name, str(error)) == ("a", "away")


def test_late_parts_are_limited_in_number(
    chords: Chords, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_THREADS", 2)
    assert chords.bring(*(chords.part(name, gate.wait) for name in "abcd")) == ["late", "late", "left", "left"]
    gate.set()
    assert {chords.after.get(timeout=PATIENCE)[0] for _ in range(2)} == {"a", "b"}
    with chords.parts._changed:
        assert chords.parts._changed.wait_for(lambda: not chords.parts.is_under_way("b"), PATIENCE)
    assert set(chords.bring(chords.part("e"))) <= {"done", "left"}
    assert "c" not in chords.delivered


def test_a_part_that_never_comes_through_is_given_up_aloud(
    chords: Chords, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert chords.bring(chords.part("a", gate.wait)) == ["late"]
    chords.parts.give_up_stuck()
    assert not caplog.records
    monkeypatch.setattr(module, "GIVEN_UP_AFTER", 0.0)
    chords.parts.give_up_stuck()
    chords.parts.give_up_stuck()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "job a" in caplog.text
    assert "chord a" in caplog.text


class Backend:
    """A backend that counts parts of chords; the part of `slow` waits at the gate."""

    def __init__(self, gate: threading.Event) -> None:
        self.gate = gate
        self.results: list[str] = []
        self.counted: SimpleQueue[str] = SimpleQueue()
        self.fails: Exception | None = None

    def deliver_results(self, notes: list[dict[str, Any]]) -> None:
        self.results += [note["result"] for note in notes]

    def deliver_chord(self, note: dict[str, Any]) -> None:
        self.counted.put(note["chord"])
        if note["chord"] == "slow":
            self.gate.wait()
            if self.fails is not None:
                raise self.fails


def ended(job: str) -> Transition:
    left = Outbox([], [{"result": job}, {"chord": job, "group": "g"}]).to_text()
    return Transition(job, Token(1, 1), "succeeded", Step.ENDED, "w", "life", 1, 1, 1, 0, outbox=left)


@pytest.mark.parametrize("fails", [None, ConnectionError("away")])
def test_end_is_written_with_the_rest_of_its_outbox_while_a_part_is_late(
    gate: threading.Event, fails: Exception | None
) -> None:
    backend = Backend(gate)
    backend.fails = fails
    recorded: SimpleQueue[Transition] = SimpleQueue()
    settled: SimpleQueue[tuple[str, str, str]] = SimpleQueue()

    def record(some: Sequence[Transition]) -> None:
        for transition in some:
            recorded.put(transition)

    delivery = Delivery(lambda: backend, "life", record, record, ChordParts("life"), lambda *said: settled.put(said))
    delivery.start()
    delivery.add([ended("slow"), ended("a")])
    delivery.add([ended("b")])
    written = {transition.job: transition for transition in (recorded.get(timeout=PATIENCE) for _ in range(3))}
    part = [{"chord": "slow", "group": "g"}]
    assert parse(written["slow"].outbox) == Outbox([], part, by="life")
    assert not written["slow"].told
    assert [(written[job].outbox, written[job].told) for job in "ab"] == [("", True)] * 2
    # Nobody waits for it at the end of the worker.
    assert delivery.flush(PATIENCE)
    delivery.stop(PATIENCE)
    assert not delivery.is_alive()
    assert settled.empty()
    gate.set()
    rest = "" if fails is None else Outbox([], part).to_text()
    assert settled.get(timeout=PATIENCE) == ("slow", written["slow"].outbox, rest)
    assert backend.results == ["slow", "a", "b"]
    assert sorted(backend.counted.get(timeout=PATIENCE) for _ in range(3)) == ["a", "b", "slow"]
    assert backend.counted.empty()


def test_where_the_system_has_no_thread_parts_are_left(chords: Chords, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(module._PartThread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
        assert chords.bring(chords.part("a"), chords.part("b")) == ["left", "left"]
    assert not chords.parts.is_under_way("a")
    assert chords.bring(chords.part("a"), chords.part("b")) == ["done", "done"]


def test_a_callback_that_ends_its_thread_is_not_called_again(chords: Chords) -> None:
    def leaves() -> None:
        raise SystemExit(3)

    assert chords.bring(chords.part("a", leaves), chords.part("b")) == ["done", "done"]
    assert chords.delivered == ["a", "b"]
    assert not chords.parts.is_under_way("a")


def test_key_of_a_delivered_part_is_short() -> None:
    box = Outbox([], [{"chord": "a", "group": "g", "text": "x" * 10_000}])
    key: Any = key_of(Attempt(Tag("a", Token(1, 1)), "life"), box)
    assert key == key_of(Attempt(Tag("a", Token(1, 1)), "another"), box)
    assert len(repr(key)) < 1000


def test_a_part_that_a_former_version_left_is_delivered() -> None:
    app = Celery("former", set_as_current=False)
    backend: Any = mock.Mock(app=app, _unpacked=lambda _: {"request": {"id": "a", "group": "g"}, "result": 1})
    CarriedResults.deliver_chord(backend, {"chord": "a", "state": "SUCCESS"})
    (request, state, value), _ = backend.on_chord_part_return.call_args
    assert (request.id, state, value) == ("a", "SUCCESS", 1)
