"""The task of the fault tests: it records when it ran, and leaves one effect in Postgres.

The trace is a file that no fault reaches. It has a line at the start of a body and a line at its end, each by one write
in append mode. The effect is a row of a table of its own, made in the transaction that ends the job.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import threading
import time
from typing import Any, Final

import psutil
from celery import shared_task
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.orm import Session

from celery_capacity import LeaseLost, PlatformError, fenced
from celery_capacity.workers.process import attempts
from tests.tasks.lasting import run_on

#: Seconds for which a body waits for a Postgres that does not take its effect, and between two tries.
EFFECT_WITHIN: Final = 120.0
EFFECT_EVERY: Final = 0.2
#: Code of Postgres's error when it takes no writes.
READ_ONLY: Final = "25006"
#: A table with a row for each time that an effect came about. It does not forbid two rows of one job.
TABLE: Final = "CREATE TABLE IF NOT EXISTS effects (job text NOT NULL, attempt int NOT NULL, pid int NOT NULL)"

_made: dict[int, Engine] = {}
_lock = threading.Lock()


def _engine() -> Engine:
    """Return this process's own engine, as a user's task has it; the engine that its parent opened is not touched."""
    with _lock:
        if os.getpid() not in _made:
            options = f"-c statement_timeout={int(EFFECT_WITHIN) * 1000}"
            connect: dict[str, Any] = {"connect_timeout": 3, "options": options}
            _made[os.getpid()] = create_engine(os.environ["DATABASE_URL"], pool_size=1, connect_args=connect)
        return _made[os.getpid()]


def leave_effect(job: str, attempt: int) -> None:
    """Leave an effect, as soon as Postgres takes it.

    Raises `LeaseLost` if the attempt no longer holds the job.
    """
    end = time.monotonic() + EFFECT_WITHIN
    pause, unsure = threading.Event(), False
    while True:
        try:
            with Session(_engine()) as session, fenced(session):
                session.execute(
                    text("INSERT INTO effects VALUES (:job, :attempt, :pid)"),
                    {"job": job, "attempt": attempt, "pid": os.getpid()},
                )
            return
        except LeaseLost:
            raise
        except PlatformError:
            if unsure:
                # The connection was lost at the commit, which came about: this attempt has ended its job already.
                return
            raise
        except InternalError as error:
            # Postgres is read-only, and nothing was committed.
            if getattr(error.orig, "pgcode", None) != READ_ONLY or time.monotonic() >= end:
                raise
            pause.wait(EFFECT_EVERY)
        except (OperationalError, InterfaceError):
            unsure = True
            if time.monotonic() >= end:
                raise
            pause.wait(EFFECT_EVERY)


def _say(self: Any, trace: str, what: str, millicores: int) -> None:
    attempt = attempts.current()
    line = {
        "what": what,
        "job": self.request.id,
        "epoch": attempt.tag.token.epoch if attempt is not None else 0,
        "attempt": self.request.attempt,
        "worker": str(self.request.hostname).partition("@")[0],
        "incarnation": attempt.incarnation if attempt is not None else "",
        "pid": os.getpid(),
        "at": time.monotonic(),
        "millicores": millicores,
    }
    descriptor = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{json.dumps(line)}\n".encode())
    os.close(descriptor)


@shared_task(bind=True)
def traced(self: Any, trace: str, value: int, how_long: float | str, millicores: int, how: str = "") -> int:
    """Run for so long and return `value`.

    `how_long`: seconds, or the path of a gate. `how`: what the body does to itself between its two lines.
    """
    _say(self, trace, "start", millicores)
    run_on(how_long)
    if how and self.request.attempt == 1:
        WAYS[how]()
    _say(self, trace, "end", millicores)
    leave_effect(self.request.id, self.request.attempt)
    return value


#: Bytes that bodies ask for when they ask for too much.
MORE: Final = 128 * 2**20

# -- things that a body can do to its process, at its first attempt


def _die() -> None:
    os.kill(os.getpid(), 9)


def _leave() -> None:
    raise SystemExit(3)


def _no_memory() -> None:
    raise MemoryError("there is no more")


def _too_much_memory() -> None:
    """Ask for more memory than the process may have, by MORE bytes: the kernel refuses it."""
    now = psutil.Process().memory_info().vms
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MORE, before[1]))
    try:
        bytearray(MORE * 2)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _take_memory() -> None:
    """Take more memory than the control group of the process has, but not so much that the machine would notice."""
    taken = bytearray(MORE * 2)
    for page in range(0, len(taken), 4096):
        taken[page] = 1


def _grandchild() -> None:
    """Start a process that would outlive the body, and go on."""
    subprocess.Popen(["sleep", "600"])
    time.sleep(60.0)


WAYS: Final = {
    "die": _die,
    "leave": _leave,
    "no memory": _no_memory,
    "too much memory": _too_much_memory,
    "take memory": _take_memory,
    "grandchild": _grandchild,
}
