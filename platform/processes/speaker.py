"""Lines of a command that watches other processes: no lost terminal, pipe or disk stops it from ending them.

A write that fails raises nothing. If the reader is gone, as after `| head`, after Ctrl-C in `| tee`, or with a closed
terminal, the stream leads to /dev/null from then on, and `on_lost` is called once. A full disk costs lines only.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TextIO

from celery_capacity.platform.console.terminal import forsake, harmless
from celery_capacity.platform.processes.supervisor import Child
from celery_capacity.workers.logs import json_lines

#: Errors of a write whose reader is gone, and the signal that other programs would get.
LOST = {errno.EPIPE: signal.SIGPIPE, errno.EIO: signal.SIGHUP}

#: Pictures of a spinner, one after the other, where the stream can encode them, and elsewhere.
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
PLAIN_SPINNER = "-\\|/"

#: Seconds between two pictures of the spinner, and between two plain lines of one status.
SPIN = 0.1
PLAIN_INTERVAL = 10.0

#: Codes that erase a terminal's present line, and that begin and end its colour.
ERASE, COLOUR, END = "\r\x1b[2K", "\x1b[36m", "\x1b[0m"


class Speaker:
    """Writer of whole lines, from any thread, with a status line below them on a terminal.

    `as_json`: each line is a JSON object, also the lines of children that are none.
    """

    def __init__(
        self, stream: TextIO | None, clock: Callable[[], float] = time.monotonic, *, as_json: bool = False
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._lock = threading.RLock()
        self._status = ""
        self._last_plain = ("", 0.0)
        #: Called with a signal's number when the reader is gone, in the thread that noticed it.
        self.on_lost: Callable[[int], None] | None = None
        self.as_json = as_json
        self.terminal = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb" and not as_json

    def say(self, line: str) -> None:
        """Write a line of this command."""
        self._write(json_lines.line_of("INFO", __name__, line) if self.as_json else harmless(line))

    def say_of(self, child: Child, line: str) -> None:
        """Write a line of a child, with its name in front. A line in JSON tells by itself where it is from."""
        if not self.as_json:
            self._write(f"[{child.name}] {harmless(line)}")
        elif line.strip():
            is_object = json_lines.message_of(line) is not None
            self._write(line if is_object else json_lines.line_of("INFO", __name__, line, process=child.name))

    def status(self, kind: str, detail: str = "") -> None:
        """Show the present step, in place on a terminal: `kind`, then `detail`, which may change every second.

        Elsewhere it is a line whenever `kind` is new, and again after ten seconds.
        """
        text = harmless(f"{kind} {detail}".rstrip())
        now = self._clock()
        if not self.terminal:
            last_kind, last_time = self._last_plain
            if kind != last_kind or now - last_time >= PLAIN_INTERVAL:
                self._last_plain = (kind, now)
                self.say(text)
            return
        with self._lock:
            self._status = self._spinning(text, now)
            self._put(f"{ERASE}{self._status}")

    def clear_status(self) -> None:
        """Remove the status line from the terminal."""
        with self._lock:
            self._last_plain = ("", 0.0)
            if self._status:
                self._status = ""
                self._put(ERASE)

    def close(self) -> None:
        """Give up a rest that cannot be written, so that the interpreter's last flush does not fail."""
        self.clear_status()
        with self._lock:
            if self._stream is None or self._stream.closed:
                return
            try:
                self._stream.flush()
            except OSError:
                self._forsake()

    def _spinning(self, text: str, now: float) -> str:
        assert self._stream is not None
        utf8 = (self._stream.encoding or "").lower().startswith("utf")
        pictures = SPINNER if utf8 else PLAIN_SPINNER
        # Cut to the terminal's width: a status that wraps could not be erased.
        text = text[: max(self._columns() - 3, 0)]
        picture = pictures[int(now / SPIN) % len(pictures)]
        return f"{picture} {text}" if os.environ.get("NO_COLOR") else f"{COLOUR}{picture}{END} {text}"

    def _columns(self) -> int:
        assert self._stream is not None
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:
            return 80

    def _write(self, line: str) -> None:
        with self._lock:
            self._put(f"{ERASE}{line}\n{self._status}" if self._status else f"{line}\n")

    def _put(self, text: str) -> None:
        if self._stream is None or self._stream.closed:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            # A full disk, for example, may have room again: only this line is lost.
            if error.errno in LOST:
                self._forsake()
                if self.on_lost is not None:
                    self.on_lost(LOST[error.errno])

    def _forsake(self) -> None:
        """Lead the stream to /dev/null: its buffered rest and all later lines go there."""
        forsake(self._stream)
        self.terminal = False
        self._status = ""
