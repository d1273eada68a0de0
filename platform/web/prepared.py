"""Values of the stores that all requests share, so that many clients cost the stores as much as one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Final

#: Least seconds from a read of a value to the next one.
MAX_AGE: Final = 0.2
#: Share of the time that reading a value may take while the rest is at most `FOLLOWING`, and beyond that.
LIGHT_SHARE: Final = 0.1
MAX_SHARE: Final = 0.25
#: Seconds of rest for which a page still follows within a second. A read of 60 ms rests so long, one of 1 s for 4 s.
FOLLOWING: Final = 0.6
#: Seconds from which on a read is slow: nobody waits for it who can have a value that is at most `STALE` seconds old.
SLOW: Final = 0.5
STALE: Final = 10.0

#: Keys of which a value is kept.
MAX_KEYS: Final = 16

Read = Callable[[], Any]


def rest_after(seconds: float) -> float:
    """Return the seconds for which a value that took `seconds` to read answers further requests."""
    return max(MAX_AGE, min(seconds / LIGHT_SHARE, FOLLOWING), seconds / MAX_SHARE)


class Prepared:
    """A value shared by all requests. `read` may block; it runs in a thread, never twice at once.

    `clock`: seconds. `pause`: waits so many seconds. `least`: seconds for which a value answers at least.
    """

    def __init__(
        self,
        read: Read,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Any] = asyncio.sleep,
        least: float = MAX_AGE,
    ) -> None:
        self._read = read
        self._clock = clock
        self._pause = pause
        self._least = least
        self._lock = asyncio.Lock()
        self._value: Any = None
        self._body: bytes | None = None
        self._begun = self._until = self._took = float("-inf")
        self._task: asyncio.Future[None] | None = None

    async def value(self, *, news: bool = False) -> Any:
        """Return the value. Raises what `read` raises.

        `news`: the caller knows of a change, so a value that was read before the call is of no use. It waits for the
        next read, which all such callers share, unless reads are slow. Then it may have to ask again.
        """
        asked = self._clock()
        if not news and asked < self._until:
            return self._value
        if self._took > SLOW and asked < self._until + STALE:
            if asked >= self._until and not self._lock.locked():
                self._task = asyncio.ensure_future(self._refresh())
            return self._value
        return await self._read_or_share(asked, news)

    def is_older_than(self, moment: float) -> bool:
        """Return True if the value was read before a moment of the clock."""
        return self._begun < moment

    async def _refresh(self) -> None:
        try:
            await self._read_or_share(self._clock(), news=True)
        except Exception:
            # The next caller reads anew, and gets the error.
            self._until = self._took = float("-inf")

    async def _read_or_share(self, asked: float, news: bool) -> Any:
        async with self._lock:
            rest = self._until - self._clock()
            if news and rest > 0 and self._begun < asked:
                await self._pause(rest)
            begin = self._clock()
            if (self._begun < asked) if news else (begin >= self._until):
                value = await asyncio.get_running_loop().run_in_executor(None, self._read)
                end = self._clock()
                self._value, self._body = value, None
                self._begun, self._took, self._until = (
                    begin,
                    end - begin,
                    end + max(self._least, rest_after(end - begin)),
                )
            return self._value

    async def body(self) -> bytes:
        """Return the value as JSON. Raises what `read` raises."""
        value = await self.value()
        if self._body is None:
            self._body = to_json(value)
        return self._body


class PreparedByKey:
    """Values by a key, such as the workers on a page. Those that were asked for last are kept."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self._read = read
        self._values: dict[Hashable, Prepared] = {}

    def __call__(self, key: Hashable) -> Prepared:
        """Return the value of a key."""
        prepared = self._values.pop(key, None) or Prepared(partial(self._read, key))
        self._values[key] = prepared
        if len(self._values) > MAX_KEYS:
            del self._values[next(iter(self._values))]
        return prepared


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
