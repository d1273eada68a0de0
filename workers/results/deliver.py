"""Delivery of the results and chord parts of ended attempts to Celery's result backend.

The worker delivers as soon as the ledger took the end, in a thread of its own, before the outcome is written to
Postgres. A result that the backend does not take now stays with the outcome, in the row. A duty brings it when the
backend is back.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.outbox import Outbox, parse
from celery_capacity.routing.store.job_transitions import Transition
from celery_capacity.workers.process.attempts import Attempt, held
from celery_capacity.workers.results.backends import HOPELESS
from celery_capacity.workers.results.batch_thread import BatchThread, Left
from celery_capacity.workers.results.chord_parts import ChordPart, ChordParts

logger = logging.getLogger(__name__)

#: Seconds for which a backend that did not answer is left alone.
PAUSE: Final = 1.0
#: Seconds after which ends with delivered parts are recorded, although other ends of the batch are not delivered yet.
RECORD_EVERY: Final = 0.25
#: Most ends delivered together.
MAX_ENDS: Final = 200


def deliver(backend: Any, outbox: Outbox, attempt: Attempt) -> None:
    """Deliver results, then chord parts, which may take any time (see `workers.results.chord_parts`).

    Raises an error of the backend that may pass: then the whole outbox is left for another try. A result that the
    backend will never take is logged and dropped. A chord part may be counted in Postgres though the backend takes no
    result.
    """
    results, problem = [note for note in outbox.results if "result" in note], None
    if results:
        try:
            _store(backend, results)
        except Exception as error:
            problem = error
    for note in chords_in(outbox):
        with held(attempt):
            _try(backend.deliver_chord, note)
    if problem is not None:
        raise problem


def chords_in(outbox: Outbox) -> list[dict[str, Any]]:
    return [note for note in outbox.results if "chord" in note]


def key_of(attempt: Attempt, outbox: Outbox) -> Hashable:
    """Return the deduplication key of an attempt's chord parts.

    A digest, because keys are kept and parts may be large.
    """
    return attempt.tag, hashlib.sha256(Outbox([], chords_in(outbox)).to_text().encode()).digest()


def name_of(outbox: Outbox) -> str:
    return ", ".join(f"chord {note.get('group')}" for note in chords_in(outbox)) or "whoever waits for its end"


def _store(backend: Any, results: Sequence[dict[str, Any]]) -> None:
    try:
        backend.deliver_results(results)
    except HOPELESS:
        for note in results:
            _try(backend.deliver_results, [note])


def _try(action: Callable[[Any], None], notes: Any) -> None:
    try:
        action(notes)
    except HOPELESS:
        logger.exception("the result backend will never take this result, which is dropped: %.200r", notes)


def as_part(
    attempt: Attempt,
    outbox: Outbox,
    deliver: Callable[[], None],
    afterwards: Callable[[Exception | None], None],
    *,
    remembered: bool = False,
) -> ChordPart:
    """Return the work of delivering an attempt's outbox as a `ChordPart`."""
    return ChordPart(attempt.tag.job, name_of(outbox), key_of(attempt, outbox), deliver, afterwards, remembered)


class Delivery(BatchThread[Transition]):
    """Queue of transitions whose outboxes its thread delivers, before it passes the transitions on.

    A transition goes on when its outbox is delivered, or has to wait: to `write`, which may wait for Postgres in this
    thread. A transition without an outbox goes to `record` at once, in the caller's thread. `note_rest` (job, old
    outbox, new outbox) updates the row where a chord part was late. The thread lives on while chord parts are late.
    """

    most = MAX_ENDS

    def __init__(
        self,
        backend: Callable[[], Any],
        incarnation: str,
        record: Callable[[Sequence[Transition]], None],
        write: Callable[[Sequence[Transition]], None],
        parts: ChordParts,
        note_rest: Callable[[str, str, str], None],
    ) -> None:
        super().__init__("delivery")
        self._backend = backend
        self._incarnation = incarnation
        self._record = record
        self._write = write
        self._parts = parts
        self._note_rest = note_rest
        self._down_until = 0.0
        parts.on_late = self.wake

    def add(self, items: Iterable[Transition]) -> None:
        """Add transitions; those without an outbox go on at once."""
        transitions = list(items)
        if carrying := [transition for transition in transitions if transition.outbox]:
            super().add(carrying)
        if rest := [transition for transition in transitions if not transition.outbox]:
            self._record(rest)

    def jobs(self) -> set[str]:
        """Return the jobs of all transitions that have not gone on."""
        return {transition.job for transition in self.unfinished()}

    def _has_work(self) -> bool:
        return super()._has_work() or self._parts.are_late

    def _work(self, batch: Sequence[Transition], *, again: bool) -> Left[Transition]:
        self._deliver(batch)
        return Left()

    def _after_batch(self) -> None:
        self._parts.give_up_stuck()

    _after_pause = _after_batch

    def _deliver(self, batch: Sequence[Transition]) -> None:
        outboxes = [parse(transition.outbox) for transition in batch]
        if time.monotonic() < self._down_until:
            self._write(batch)
            return
        try:
            _store(self._backend(), [note for outbox in outboxes for note in outbox.results if "result" in note])
        except Exception as error:
            self._leave(len(batch), error)
            self._write(batch)
            return
        pairs = list(zip(batch, outboxes, strict=True))
        if rest := [_without(transition, outbox) for transition, outbox in pairs if not chords_in(outbox)]:
            self._write(rest)
        self._deliver_parts([(transition, outbox) for transition, outbox in pairs if chords_in(outbox)])

    def _leave(self, number: int, error: Exception) -> None:
        """Leave results to the duty after any error, and pause deliveries. The ends themselves go on."""
        self._down_until = time.monotonic() + PAUSE
        logger.warning("the result backend does not take %d results, they are kept: %s", number, error)

    def _deliver_parts(self, carrying: Sequence[tuple[Transition, Outbox]]) -> None:
        parts = [self._part(transition, outbox) for transition, outbox in carrying]
        ready, since = list[Transition](), time.monotonic()
        kept, failed = 0, None
        for part, (transition, outbox) in zip(self._parts.deliver(parts), carrying, strict=True):
            if part.late:
                # Record at once: other workers soon take such entries of the stream for abandoned.
                self._write([*ready, replace(transition, outbox=self._under_way(outbox).to_text())])
                ready, since = [], time.monotonic()
                continue
            if part.done:
                ready.append(_without(transition, outbox))
            else:
                ready.append(replace(transition, outbox=_left(outbox).to_text()))
                kept, failed = kept + 1, failed or part.error
            if time.monotonic() - since > RECORD_EVERY:
                self._write(ready)
                ready, since = [], time.monotonic()
        if failed is not None:
            self._leave(kept, failed)
        if ready:
            self._write(ready)

    def _part(self, transition: Transition, outbox: Outbox) -> ChordPart:
        job = transition.job
        attempt = Attempt(Tag(job, transition.token), self._incarnation, patient=self._may_wait)

        def afterwards(error: Exception | None) -> None:
            if error is not None:
                logger.warning("the part of a chord that job %s left is kept: %s", job, error)
            rest = _left(outbox).to_text() if error is not None else ""
            self._note_rest(job, self._under_way(outbox).to_text(), rest)

        return as_part(
            attempt,
            outbox,
            lambda: deliver(self._backend(), Outbox([], chords_in(outbox)), attempt),
            afterwards,
            remembered=True,
        )

    def _under_way(self, outbox: Outbox) -> Outbox:
        return replace(_left(outbox), by=self._incarnation)

    def _may_wait(self) -> bool:
        return not self._stopping


def _left(outbox: Outbox) -> Outbox:
    """Return the rest of an outbox once its results are delivered."""
    return Outbox(outbox.publishes, chords_in(outbox))


def _without(transition: Transition, outbox: Outbox) -> Transition:
    """Return a transition whose results and chord parts are all delivered. Its publishes stay in the outbox."""
    return replace(transition, outbox=Outbox(outbox.publishes).to_text(), told=True)
