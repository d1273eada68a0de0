"""Delivering what ended attempts left: results and parts of chords, to Celery's result backend.

The worker does so as soon as the ledger took the end, in a thread of its own, before the outcome is written to
Postgres. What the backend does not take now stays with the outcome, in the row; a duty brings it when the backend is
back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from routing import native
from routing.message import Tag
from routing.outbox import Outbox, parse
from routing.store import Transition
from workers.attempts import Attempt, held
from workers.results import HOPELESS

logger = logging.getLogger(__name__)

#: Seconds for which a backend that did not answer is left alone.
PAUSE: Final = 1.0
#: Ends delivered together.
MOST: Final = 200


def deliver(backend: Any, box: Outbox, attempt: Attempt) -> Outbox:
    """Deliver results, then parts of chords; returns what is left. Raises what the backend raises, where it may pass:
    then all is left. What it will never take is logged and dropped."""
    results = [note for note in box.results if "result" in note]
    if results:
        _store(backend, results)
    for note in box.results:
        if "chord" in note:
            with held(attempt):
                _try(backend.deliver_chord, note)
    return Outbox(box.publishes)


def _store(backend: Any, results: Sequence[dict[str, Any]]) -> None:
    try:
        backend.deliver_results(results)
    except HOPELESS:
        for one in results:
            _try(backend.deliver_results, [one])


def _try(action: Callable[[Any], None], notes: Any) -> None:
    try:
        action(notes)
    except HOPELESS:
        logger.exception("what a job left for the result backend cannot be delivered and is dropped: %.200r", notes)


class Delivery(native.Thread):
    """`add` never blocks. Transitions go on to `record` when what they carry was delivered, or has to wait."""

    def __init__(
        self, backend: Callable[[], Any], incarnation: str, record: Callable[[Sequence[Transition]], None]
    ) -> None:
        super().__init__(name="delivery", daemon=True)
        self._backend = backend
        self._incarnation = incarnation
        self._record = record
        self._pending: list[Transition] = []
        self._delivering = False
        self._changed = threading.Condition()
        self._stopping = False
        self._down_until = 0.0

    def add(self, transitions: Sequence[Transition]) -> None:
        carrying = [one for one in transitions if one.outbox]
        if carrying:
            with self._changed:
                self._pending += carrying
                self._changed.notify_all()
        rest = [one for one in transitions if not one.outbox] if carrying else transitions
        if rest:
            self._record(rest)

    def flush(self, within: float) -> bool:
        """Wait until all that was added went on."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._pending or self._delivering), within)

    def stop(self, within: float) -> None:
        """Deliver what is pending, or leave it to the duty, and end."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self.is_alive():
            self.join(within)

    def run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._stopping)
                batch, self._pending = self._pending[:MOST], self._pending[MOST:]
                self._delivering = bool(batch)
            if not batch:
                return
            self._record(self._deliver(batch))
            with self._changed:
                self._delivering = False
                self._changed.notify_all()

    def _deliver(self, batch: Sequence[Transition]) -> list[Transition]:
        boxes = [parse(one.outbox) for one in batch]
        if time.monotonic() < self._down_until:
            return list(batch)
        try:
            _store(self._backend(), [note for box in boxes for note in box.results if "result" in note])
            return [self._parts(one, box) for one, box in zip(batch, boxes, strict=True)]
        except Exception as error:
            # Whatever it is: the ends themselves go on, and the duty tries again.
            self._down_until = time.monotonic() + PAUSE
            logger.warning("the result backend does not take %d results, they are kept: %s", len(batch), error)
            return list(batch)

    def _parts(self, one: Transition, box: Outbox) -> Transition:
        chords = [note for note in box.results if "chord" in note]
        if chords:
            attempt = Attempt(Tag(one.job, one.epoch, one.attempt), self._incarnation, patient=self._may_wait)
            deliver(self._backend(), Outbox([], chords), attempt)
        return replace(one, outbox=Outbox(box.publishes).to_text(), told=True)

    def _may_wait(self) -> bool:
        return not self._stopping
