"""A value of the stores that all requests share, so that many clients cost the stores as much as one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, Final

#: Seconds for which a value that was read answers further requests.
MAX_AGE: Final = 0.2
#: Greatest share of the time that reading a value may take. A read of 0.5 s answers requests for 5 s.
MAX_SHARE: Final = 0.1

Read = Callable[[], Any]


class Prepared:
    """A value shared by all requests. `read` may block; it runs in a thread, never twice at once."""

    def __init__(self, read: Read, clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._lock = asyncio.Lock()
        self._value: Any = None
        self._body: bytes | None = None
        self._until = float("-inf")

    async def value(self) -> Any:
        """Return the value. Raises what `read` raises."""
        async with self._lock:
            begin = self._clock()
            if begin >= self._until:
                value = await asyncio.get_running_loop().run_in_executor(None, self._read)
                end = self._clock()
                self._value, self._body = value, None
                self._until = end + max(MAX_AGE, (end - begin) / MAX_SHARE)
            return self._value

    async def body(self) -> bytes:
        """Return the value as JSON. Raises what `read` raises."""
        value = await self.value()
        if self._body is None:
            self._body = to_json(value)
        return self._body


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
