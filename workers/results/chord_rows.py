"""Chords that are made, counted and completed in Postgres while Redis is away (`routing.store.chord_counts`).

A chord is counted where its size was stored. A chord that was made before Redis went away is counted in Redis, and
waits for it. A chord with a failed part waits too, since its body's result is stored in Redis. A body is published
under the id that it has had from the beginning, so a second publish of it changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from celery.canvas import maybe_signature
from celery.exceptions import ChordError
from celery.result import GroupResult, allow_join_result, result_from_tuple
from celery.utils.functional import _regen
from kombu.exceptions import EncodeError
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import Connection

from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.errors import InvalidRequest, Unsupported
from celery_capacity.routing.store import chord_counts
from celery_capacity.routing.store.chord_counts import Chord
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.waiting_for_stores import may_pass
from celery_capacity.workers.results.row_results import RowResults

#: Errors for a body that can be published neither now nor later: a wrong request, too large a message.
NEVER_PUBLISHED: Final = (InvalidRequest, Unsupported, EncodeError, TypeError, ValueError, AttributeError, LookupError)


class RowChords(RowResults):
    """Mixin for a Redis backend that counts chords in Postgres while Redis is away."""

    # -- making one

    def set_chord_size(self, group_id: str, chord_size: int) -> None:
        self._store(
            lambda: super(RowChords, self).set_chord_size(group_id, chord_size),
            lambda connection: chord_counts.note(connection, group_id, size=chord_size),
        )

    def apply_chord(self, header_result_args: Any, body: Any, **options: Any) -> None:
        def note(connection: Connection) -> None:
            if isinstance(header_result_args[1], _regen):
                return
            header = self.app.GroupResult(*header_result_args)
            if any(isinstance(result, GroupResult) for result in header.results):
                chord_counts.note(connection, header.id, structure=json.dumps(header.as_tuple()))

        self._store(lambda: super(RowChords, self).apply_chord(header_result_args, body, **options), note)

    def add_to_chord(self, group_id: str, result: Any) -> None:
        if self.is_on_platform:
            with self.app.platform.engine.connect() as connection:
                if chord_counts.enlarge(connection, group_id):
                    return
        super().add_to_chord(group_id, result)

    def _store(self, store: Callable[[], None], note: Callable[[Connection], None]) -> None:
        """Store the size or the structure of a chord in Redis, or in Postgres while Redis is away."""
        if not self.is_on_platform:
            store()
            return
        if self.reach.closed:
            try:
                with self.asking_once():
                    store()
                return
            except self.connection_errors as error:
                if not may_pass(error):
                    raise
        with translated("a chord was not made: "), self.app.platform.engine.connect() as connection:
            note(connection)

    # -- counting its parts

    def on_chord_part_return(self, request: Any, state: str, result: Any, *more: Any, **options: Any) -> None:
        if not (request.group and request.id and self.is_on_platform):
            super().on_chord_part_return(request, state, result, *more, **options)
            return
        away: BaseException | None = None
        try:
            counts = super().on_chord_part_return
            self.ask(lambda: counts(request, state, result, *more, **options))
            if self.ask(lambda: self._is_counted_in_redis(request.group)):
                return
        except self.connection_errors as error:
            if not may_pass(error):
                raise
            away = error
        self._count(request, state, result, away)

    def _is_counted_in_redis(self, group: str) -> bool:
        """Return whether Redis knows the size of a chord, or has just completed it."""
        return bool(self.client.exists(*(self.get_key_for_group(group, end) for end in (".s", ".c"))))

    def _count(self, request: Any, state: str, result: Any, away: BaseException | None) -> None:
        """Keep a part whose chord may be counted in Postgres. Raises the error of Redis if it may be counted there."""
        index = request.group_index
        position = float("inf") if index is None else float(index)
        outcome = self.encode([1, request.id, state, self.encode_result(result, state)])
        raw = outcome.encode() if isinstance(outcome, str) else bytes(outcome)
        with self._transaction() as connection:
            chord_counts.add_part(connection, request.group, f"{request.id}:{index}", position, raw)
            noted = chord_counts.is_noted(connection, request.group)
        if noted:
            self._complete(request)
        elif away is not None:
            raise away

    def _transaction(self) -> Any:
        return self.app.platform.engine.execution_options(isolation_level="READ COMMITTED").begin()

    def _complete(self, request: Any) -> None:
        """Publish the body of a chord whose parts have all come."""
        with self._transaction() as connection:
            chord = chord_counts.lock(connection, request.group)
            if chord is None or not chord_counts.is_complete(connection, request.group, chord):
                return
            body = maybe_signature(request.chord, app=self.app)
            try:
                self._publish(body, self._values(connection, request.group, chord))
            except ChordError as error:
                if not self.reach.closed:
                    raise RedisConnectionError("the failure of a chord is told when Redis is back") from error
                self.chord_error_from_stack(body, error)
            chord_counts.forget(connection, request.group)

    def _publish(self, body: Any, values: list[Any]) -> None:
        """Publish the body of a chord. Raises `ChordError` where no try would ever succeed, as Celery's backend does.

        The chord fails then, and a waiting client hears of that.
        """
        try:
            body.delay(values)
        except NEVER_PUBLISHED as error:
            raise ChordError(f"Callback error: {error!r}") from error

    def _values(self, connection: Connection, group: str, chord: Chord) -> list[Any]:
        """Return the values of a chord's parts, in order. Raises `ChordError` where a part failed."""
        if chord.structure is None:
            return [self._unpack_chord_result(part, self.decode) for part in chord_counts.parts(connection, group)]
        header = result_from_tuple(json.loads(chord.structure), app=self.app)
        header.on_ready()
        try:
            with allow_join_result(), attempts.apart():
                values: list[Any] = header.join_native(timeout=self.app.conf.result_chord_join_timeout, propagate=True)
        except Exception as error:
            raise ChordError(f"Join error: {error!r}") from error
        return values
