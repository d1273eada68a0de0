"""Wake-ups of a thread or an event loop, by a pipe: writing one byte is safe in any thread and in a signal handler."""

from __future__ import annotations

import os
import select
from collections.abc import Collection
from typing import Final

from celery_capacity.routing import os_threads

_ALL: Final = 4096


class Wake:
    """Wake-up of a thread in `wait`, or of a loop that watches `fileno`; several `set` before it wakes are one."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        return self._read

    def close(self) -> None:
        """Close the pipe. The caller makes sure that nobody uses it any more."""
        os.close(self._read)
        os.close(self._write)

    def set(self) -> None:
        try:
            os.write(self._write, b"!")
        except BlockingIOError:
            # The pipe is full of wake-ups already: another one says nothing new.
            return

    def clear(self) -> None:
        try:
            while len(os.read(self._read, _ALL)) == _ALL:
                pass
        except BlockingIOError:
            # The pipe is empty: there is nothing to clear.
            return

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds; return True if woken."""
        return self._read in self._poll(timeout, self._read)

    def wait_beside(self, descriptor: int, timeout: float) -> tuple[bool, bool]:
        """Wait up to `timeout` seconds; return whether it was woken, and whether the other descriptor can be read."""
        ready = self._poll(timeout, self._read, descriptor)
        return self._read in ready, descriptor in ready

    def _poll(self, timeout: float, *descriptors: int) -> Collection[int]:
        poll = os_threads.poll()
        for descriptor in descriptors:
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(max(0, timeout) * 1000)}
        if self._read in ready:
            self.clear()
        return ready
