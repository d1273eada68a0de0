"""CPU counts in a JSON file: a program that wants CPUs takes a lock, reads, writes, and releases the lock."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.proposals.way import ASKED, CPUS, Cluster, Held

#: Worker -> (CPUs by hand, CPUs taken).
Counts = dict[str, list[int]]


class FileCounts:
    """A file that somebody wrote by hand, and in which the programs record their taken CPUs.

    The file is replaced whole, and synced to disk as Postgres syncs. So a reader needs no lock, and a crash leaves the
    old file or the new one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = path.with_suffix(".lock")

    def load(self, cluster: Cluster) -> None:
        self._write({name: [CPUS, held] for name, held in cluster.held.items()})

    def apart(self) -> FileCounts:
        return FileCounts(self._path)

    def taken(self) -> int:
        return sum(taken for _, taken in self._read().values())

    def free(self) -> Mapping[str, int]:
        return {name: cpus - taken for name, (cpus, taken) in self._read().items()}

    def admit(self) -> Held | None:
        with self._locked():
            counts = self._read()
            fitting = [(cpus - taken, name) for name, (cpus, taken) in counts.items() if cpus - taken >= ASKED]
            if not fitting:
                return None
            _, worker = min(fitting)
            counts[worker][1] += ASKED
            self._write(counts)
        return Held(worker)

    def release(self, held: Held) -> None:
        with self._locked():
            counts = self._read()
            counts[held.worker][1] -= ASKED
            self._write(counts)

    def beat(self, worker: str) -> None:
        """Do nothing: the file does not know that workers live."""

    def watch(self) -> None:
        """Do nothing: nobody looks."""

    def empty(self) -> None:
        self._write({name: [cpus, 0] for name, (cpus, _) in self._read().items()})

    def recover(self) -> int:
        """Do nothing, because no program can tell that the file is another one. Return 0."""
        return 0

    def close(self) -> None:
        """Do nothing: no file is open."""

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read(self) -> Counts:
        counts: Counts = json.loads(self._path.read_text())
        return counts

    def _write(self, counts: Counts) -> None:
        new = self._path.with_suffix(".new")
        with new.open("w") as file:
            json.dump(counts, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
