"""What a worker has noted and Postgres does not take is not taken for written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from workers import recorder
from workers.recorder import Recorder


class Away:
    """A Postgres that does not answer."""

    def connect(self) -> Any:
        raise OperationalError("", None, Exception("nobody is there"))


class Handed(threading.Condition):
    """Whoever waits for the lock has it before the one that let it go comes back for it."""

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        threading.Event().wait(0.005)


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setattr(recorder, "RETRY_AFTER", (0.001,))
    unwritten: Any = object()
    writing = Recorder(Away(), None)  # type: ignore[arg-type]
    writing._changed = Handed()
    writing.start()
    writing.add([unwritten])
    yield writing
    writing.stop(5.0)


def test_a_flush_never_says_that_all_is_written_while_it_is_not(writing: Recorder) -> None:
    """A worker that believed it would give back what had ended, and the job would run again."""
    assert not any(writing.flush(0.01) for _ in range(20))
