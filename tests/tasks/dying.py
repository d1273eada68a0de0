"""A module that kills a process of a fault test at one step, which the environment names.

    DIE_AT     before|after module:function, where `function` may be Class.method; with @N at the Nth call of it, with
               @0 at any call
    DIE_ONCE   a file that is made when a process has died this way, so that no other process does
    DIE_BY     the signal that the process sends itself: SIGKILL by default, SIGSTOP for a process that goes on later

The product knows nothing of it. The named function is replaced by a function that calls it and kills its process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any


def die(once: str) -> None:
    """Send the signal to this process, if it is the first."""
    try:
        os.close(os.open(once, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.Signals[os.environ.get("DIE_BY", "SIGKILL")])


def arm(point: str, once: str) -> None:
    """Replace the function that `point` names."""
    when, _, place = point.partition(" ")
    place, _, count = place.partition("@")
    module, _, name = place.partition(":")
    owner: Any = import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    calls = iter(range(1, 10**9))
    setattr(owner, last, _dying(getattr(owner, last), when, int(count or 1), lambda: next(calls), once))


def _dying(real: Callable[..., Any], when: str, fatal: int, number: Callable[[], int], once: str) -> Callable[..., Any]:
    @wraps(real)
    def dying(*args: Any, **options: Any) -> Any:
        mine = number() == fatal or fatal == 0
        if mine and when == "before":
            die(once)
        result = real(*args, **options)
        if mine and when == "after":
            die(once)
        return result

    return dying


if os.environ.get("DIE_AT"):
    arm(os.environ["DIE_AT"], os.environ["DIE_ONCE"])
