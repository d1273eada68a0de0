"""A side under a fixed rate of jobs."""

from __future__ import annotations

import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import ProcessFailed, Side, Submitter, Worker, submitter, worker
from benchmarks.servers import Pair, private_pair
from benchmarks.tasks import NOTE, NOTES

#: Processes of the worker's pool, and the CPUs that ours publishes for them.
CONCURRENCY = 2

#: Jobs that are always under way while the highest rate is measured, for so many seconds, after so many more.
UNDER_WAY, SATURATED_SECONDS, WARM_UP_SECONDS = 50, 5.0, 1.0

#: Seconds between two looks at the notes, and for the last jobs to end.
LOOK_SECONDS, PATIENCE = 0.25, 120.0


@dataclass(frozen=True)
class Note:
    """A job that ended: when it was due and when its body ended, in seconds of this machine's monotonic clock."""

    due: float
    ended: float

    @property
    def milliseconds(self) -> float:
        return (self.ended - self.due) * 1000


@dataclass
class Load:
    """The processes of a side, and the file in which its tasks note their ends."""

    side: Side
    pair: Pair
    sender: Submitter
    worker: Worker
    notes_path: Path
    _read: int = 0

    def highest_rate(self) -> float:
        """Return the jobs a second that this side keeps up, with `UNDER_WAY` jobs always under way.

        A burst of jobs would overstate it. Both sides put off work until a burst is over, and a side that works in
        batches makes larger ones of a longer queue. Jobs that arrive at this rate leave neither pause nor queue.
        """
        self._saturate(WARM_UP_SECONDS)
        begin = time.monotonic()
        notes = self._saturate(SATURATED_SECONDS)
        return len(notes) / (max(note.ended for note in notes) - begin)

    def _saturate(self, seconds: float) -> list[Note]:
        """Keep jobs under way for so many seconds, and return all of them once they ended."""
        return self._gather(self.sender.call("saturate", seconds=seconds, under_way=UNDER_WAY))

    def run(self, rate: float, seconds: float, look: Callable[[list[Note]], None]) -> None:
        """Submit at a rate for so long, and give each look the jobs that ended since the one before.

        Raises ProcessFailed if a job does not end.
        """
        count = max(1, round(rate * seconds))
        self.sender.begin("paced", rate=rate, count=count)
        latest = time.monotonic() + seconds + PATIENCE
        ended = 0
        while ended < count:
            if time.monotonic() > latest:
                raise ProcessFailed(f"{count - ended} of {count} jobs did not end:\n{self.worker.log_tail()}")
            time.sleep(LOOK_SECONDS)
            notes = self.notes()
            ended += len(notes)
            look(notes)
        self.sender.answer("paced")

    def notes(self) -> list[Note]:
        """Return the jobs that ended since the last call."""
        with self.notes_path.open("rb") as file:
            file.seek(self._read)
            written = file.read()
        whole = len(written) - len(written) % struct.calcsize(NOTE)
        self._read += whole
        return [Note(due, ended) for due, ended in struct.iter_unpack(NOTE, written[:whole])]

    def _gather(self, count: int) -> list[Note]:
        """Wait for so many jobs to end."""
        notes: list[Note] = []
        latest = time.monotonic() + PATIENCE
        while len(notes) < count:
            if time.monotonic() > latest:
                raise ProcessFailed(f"{count - len(notes)} of {count} jobs did not end:\n{self.worker.log_tail()}")
            time.sleep(LOOK_SECONDS)
            notes += self.notes()
        return notes


@contextmanager
def load(side: Side, settings: Mapping[str, str] | None = None) -> Iterator[Load]:
    """Start servers, a submitter and a worker of a side. `settings` are added to the environment of both."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, private_pair(Path(folder)) as pair:
        path = Path(folder) / "notes"
        path.touch()
        added = {NOTES: str(path), **(settings or {})}
        with (
            worker(side, pair, concurrency=CONCURRENCY, cpus=CONCURRENCY, settings=added) as receiver,
            submitter(side, pair, settings=added) as sender,
        ):
            yield Load(side, pair, sender, receiver, path)
