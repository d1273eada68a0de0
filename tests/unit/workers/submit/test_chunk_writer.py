"""Order and number of the chunks that are under way at once, with threads and without stores."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from celery_capacity.routing.errors import NotAccepted
from celery_capacity.routing.insert.bulk import Committed
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.states import Store
from celery_capacity.workers.submit import chunk_writer
from celery_capacity.workers.submit.chunk_writer import MAX_AGE, ChunkWriter

#: Jobs of a chunk.
SIZE = 3


class Writing:
    """A chunk writer whose stores are lists. `store`: called with the ids of a chunk before they are stored."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Callable[[list[str]], object]) -> None:
        self.stored: list[str] = []
        self.brought: list[str] = []
        self._store = store
        rows = SimpleNamespace(write=lambda copy, jobs, attempt: copy())
        stores = SimpleNamespace(settings=SimpleNamespace(store_timeout=5.0))
        self.writer = ChunkWriter(SimpleNamespace(rows=rows), stores, None, SIZE)  # type: ignore[arg-type]
        self.writer.ages = True
        monkeypatch.setattr(self.writer, "_copy", self._copy)
        monkeypatch.setattr(chunk_writer, "to_ledger", self._to_ledger)

    def add(self, *ids: str) -> None:
        for job in ids:
            self.writer.add(NewJob(job, "demo", "cpus=1000,slots=1", b""))

    def _copy(self, jobs: Sequence[NewJob]) -> Committed:
        ids = [job.id for job in jobs]
        self._store(ids)
        self.stored += ids
        return Committed({job: number for number, job in enumerate(ids)}, 1, Store.LEDGER)

    def _to_ledger(self, _: Any, jobs: Sequence[NewJob], *more: Any) -> None:
        self.brought += [job.id for job in jobs]


def first_is_slow(ids: list[str]) -> None:
    if "1" in ids:
        time.sleep(4 * MAX_AGE)


def test_old_chunk_is_stored_behind_the_full_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    writing = Writing(monkeypatch, first_is_slow)
    writing.add("1", "2", "3", "4")
    time.sleep(8 * MAX_AGE)
    assert writing.stored == ["1", "2", "3", "4"]
    writing.writer.flush()
    writing.writer.close()
    assert writing.brought == writing.stored


def test_nothing_is_stored_behind_a_chunk_that_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(ids: list[str]) -> None:
        first_is_slow(ids)
        if "1" in ids:
            raise NotAccepted("refused")

    writing = Writing(monkeypatch, refuse)
    writing.add("1", "2", "3", "4")
    time.sleep(8 * MAX_AGE)
    with pytest.raises(NotAccepted):
        writing.writer.flush()
    writing.writer.close()
    assert writing.stored == []
    assert not writing.writer.stand
