"""Wake-ups of a thread, alone and beside a descriptor."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from celery_capacity.routing.wake import Wake


@pytest.fixture
def wake() -> Iterator[Wake]:
    waking = Wake()
    yield waking
    waking.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


def test_several_wake_ups_are_one(wake: Wake) -> None:
    wake.set()
    wake.set()
    assert wake.wait(0.0)
    assert not wake.wait(0.0)


def test_wait_beside_a_descriptor_tells_which_of_them_is_ready(wake: Wake, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    assert wake.wait_beside(reading, 0.0) == (False, False)
    wake.set()
    assert wake.wait_beside(reading, 0.0) == (True, False)
    os.write(writing, b"!")
    assert wake.wait_beside(reading, 0.0) == (False, True)
    wake.set()
    assert wake.wait_beside(reading, 0.0) == (True, True)
