"""A value that requests share: how old it may be, and who waits for a new one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from celery_capacity.platform.web.prepared import FOLLOWING, MAX_AGE, MAX_KEYS, Prepared, PreparedByKey, rest_after


class Clock:
    """A clock that only pauses and reads move."""

    def __init__(self, read_takes: float = 0.0) -> None:
        self.now = 100.0
        self.reads = 0
        self.read_takes = read_takes

    def read(self) -> int:
        self.reads += 1
        self.now += self.read_takes
        return self.reads

    async def pause(self, seconds: float) -> None:
        self.now += seconds

    def prepared(self) -> Prepared:
        return Prepared(self.read, lambda: self.now, self.pause)


def run(clock: Clock, ask: Callable[[Prepared], Awaitable[Any]]) -> Any:
    async def begin() -> Any:
        return await ask(clock.prepared())

    return asyncio.run(begin())


def test_news_waits_for_next_read_and_others_do_not() -> None:
    clock = Clock(read_takes=0.05)

    async def ask(prepared: Prepared) -> list[Any]:
        first = await prepared.value()
        clock.now += 0.01
        others = await prepared.value()
        before = clock.now
        news = await prepared.value(news=True)
        return [first, others, news, round(clock.now - before, 6)]

    # The rest of 0.5 s, less the 0.01 s that went by, and the read itself.
    assert run(clock, ask) == [1, 1, 2, 0.54]


def test_news_of_many_callers_take_one_read() -> None:
    clock = Clock(read_takes=0.01)

    async def ask(prepared: Prepared) -> list[int]:
        await prepared.value()
        clock.now += 0.001
        return list(await asyncio.gather(*(prepared.value(news=True) for _ in range(5))))

    assert run(clock, ask) == [2] * 5


def test_slow_value_is_read_while_callers_have_the_older_one() -> None:
    clock = Clock(read_takes=1.0)

    async def ask(prepared: Prepared) -> list[Any]:
        values = [await prepared.value(news=True)]
        asked = clock.now
        values += [await prepared.value(news=True), clock.reads, prepared.is_older_than(asked)]
        clock.now += rest_after(1.0)
        values.append(await prepared.value(news=True))
        while clock.reads < 2 or prepared.is_older_than(asked):
            await asyncio.sleep(0)
        return [*values, await prepared.value()]

    assert run(clock, ask) == [1, 1, 1, True, 1, 2]


def test_error_of_a_read_beside_callers_reaches_the_next_one() -> None:
    clock = Clock(read_takes=1.0)
    failures = [ValueError("gone")]

    async def ask(prepared: Prepared) -> list[Any]:
        await prepared.value()
        clock.now += rest_after(1.0)
        read = prepared._read

        def fail() -> int:
            raise failures.pop()

        prepared._read = fail
        first = await prepared.value()
        while failures:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        prepared._read = read
        while (value := await prepared.value()) == first:
            await asyncio.sleep(0)
        return [first, value]

    assert run(clock, ask) == [1, 2]


@pytest.mark.parametrize(("took", "rest"), [(0.001, MAX_AGE), (0.04, 0.4), (0.1, FOLLOWING), (1.0, 4.0)])
def test_rest_grows_with_the_cost_of_a_read(took: float, rest: float) -> None:
    assert rest_after(took) == pytest.approx(rest)


def test_values_by_key_keep_those_asked_for_last() -> None:
    values = PreparedByKey(lambda key: key)
    first = values("a")
    for number in range(MAX_KEYS - 1):
        values(number)
    assert values("a") is first
    values("b")
    assert values("a") is first
    assert len(values._values) == MAX_KEYS
