"""Many jobs that one program submits in a row: the ledger has them soon, in their order, also when the program ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from celery_capacity.routing.config import timeouts
from celery_capacity.routing.inspect import backlog_limit
from celery_capacity.routing.ledger import keys
from celery_capacity.workers.dispatch import circuit
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import PATIENCE

ADD = "tests.fixtures.tasks.add"
MANY = 60
#: Python 3.12 counts a thread until the system has cleared it away, a moment after its end. The program counts its
#: threads itself.
QUIET = ("-W", "ignore:This process:DeprecationWarning")

SEND = f"""
from celery_capacity import create_app

app = create_app("short")

def send(who):
    for number in range({MANY}):
        app.send_task("{ADD}", [number, 1], cpus=1, task_id=f"{{who}}-{{number}}")
"""
#: Programs that submit one job after the other, and end.
PROGRAMS = {
    "plain": f"""{SEND}
send("plain")
""",
    # A child, made in the middle, ends while its parent still has jobs in hand.
    "forking": f"""{SEND}
import os, sys, threading

send("parent")
child = os.fork()
if child == 0:
    send("child")
    sys.exit()
assert threading.active_count() == 1, threading.enumerate()
send("parent-again")
sys.exit(os.waitpid(child, 0)[1])
""",
    # The program's children end by `os._exit`, after the usual steps of `multiprocessing`.
    "multiprocessing": f"""{SEND}
import multiprocessing

send("ahead")
child = multiprocessing.get_context("fork").Process(target=send, args=["process"])
child.start()
child.join()
assert child.exitcode == 0
""",
    # The first registered function runs last.
    "at its exit": f"""
import atexit
atexit.register(lambda: send("last"))
{SEND}
atexit.register(lambda: send("first"))
""",
}
SENDERS = ("plain", "parent", "child", "parent-again", "ahead", "process", "first", "last")


def _known(platform: Platform) -> set[str]:
    prefix = keys.KEYS["job"]
    job_keys: Any = platform.redis.scan_iter(prefix + "*")
    return {key.decode().removeprefix(prefix) for key in job_keys}


def test_a_program_that_ends_right_after_it_sent_jobs_has_told_the_ledger(
    platform: Platform, submitter: Submitter
) -> None:
    worker = platform.worker("a", 1, "threads")
    before = submitter.send(ADD, 0, 0)
    assert submitter.value(before) == 0
    worker.signal(signal.SIGSTOP)
    for name, program in PROGRAMS.items():
        ran = subprocess.run(
            [sys.executable, *QUIET, "-c", program],
            env={**os.environ, **platform.environment},
            timeout=PATIENCE,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (name, ran.returncode, ran.stderr) == (name, 0, "")
    sent = {f"{who}-{number}" for who in SENDERS for number in range(MANY)}
    assert sent - _known(platform) == set()
    worker.signal(signal.SIGCONT)
    assert {submitter.ended(job).state for job in sent} == {"succeeded"}


def test_what_a_program_asks_the_ledger_comes_behind_what_it_has_sent(
    platform: Platform, submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine too, no job is left to the duties after a slow answer.
    monkeypatch.setattr(circuit, "SLOW", float("inf"))
    for name in ("QUICK_ANSWER", "QUICK_ATTEMPT"):
        monkeypatch.setattr(timeouts, name, 10 * getattr(timeouts, name))
    worker = platform.worker("a", 1, "threads")
    assert submitter.value(submitter.send(ADD, 0, 0)) == 0
    worker.signal(signal.SIGSTOP)
    jobs = [submitter.app.send_task(ADD, [number, 1]).id for number in range(MANY)]
    # The first job is admitted.
    waiting = submitter.app.platform.sending.ask(backlog_limit.waiting_in_ledger)
    assert waiting == MANY - 1
    worker.signal(signal.SIGCONT)
    rows = [submitter.ended(job) for job in jobs]
    assert [row.state for row in rows] == ["succeeded"] * MANY
    starts = [row.started_at for row in rows]
    assert starts == sorted(starts)
