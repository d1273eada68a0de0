"""Many jobs that one program submits in a row: the ledger has them soon, in their order, also where it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from routing import keys, limits
from tests.fixtures.processes import Platform
from tests.fixtures.submitting import Submitter
from tests.fixtures.waiting import PATIENCE

ADD = "tests.fixtures.tasks.add"
MANY = 60

#: A program that submits one job after the other, and ends.
PROGRAM = f"""
from celery_capacity import create_app

app = create_app("short")
for number in range({MANY}):
    app.send_task("{ADD}", [number, 1], cpus=1, task_id=f"job-{{number}}")
"""


#: The same; a child of it, made in the middle, ends while its parent still has jobs in hand.
FORKING = f"""
import os, sys
from celery_capacity import create_app

app = create_app("forking")
for number in range({MANY}):
    app.send_task("{ADD}", [number, 1], cpus=1, task_id=f"job-{{number}}")
    if number == {MANY // 2}:
        child = os.fork()
        if child == 0:
            app.send_task("{ADD}", [number, 1], cpus=1, task_id="of-the-child")
            sys.exit()
sys.exit(os.waitpid(child, 0)[1])
"""


def _known(platform: Platform) -> set[str]:
    prefix = keys.KEYS["job"]
    found: Any = platform.redis.scan_iter(prefix + "*")
    return {key.decode().removeprefix(prefix) for key in found}


@pytest.mark.parametrize(("program", "also"), [(PROGRAM, ()), (FORKING, ("of-the-child",))], ids=["plain", "forking"])
def test_a_program_that_ends_right_after_it_sent_jobs_has_told_the_ledger(
    platform: Platform, submitter: Submitter, program: str, also: tuple[str, ...]
) -> None:
    worker = platform.worker("a", 1, "threads")
    before = submitter.send(ADD, 0, 0)
    assert submitter.value(before) == 0
    worker.signal(signal.SIGSTOP)
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **platform.environment},
        timeout=PATIENCE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    sent = {*also, *(f"job-{number}" for number in range(MANY))}
    assert _known(platform) >= sent
    worker.signal(signal.SIGCONT)
    assert {submitter.ended(job).state for job in sent} == {"succeeded"}


def test_what_a_program_asks_the_ledger_comes_behind_what_it_has_sent(
    platform: Platform, submitter: Submitter
) -> None:
    worker = platform.worker("a", 1, "threads")
    assert submitter.value(submitter.send(ADD, 0, 0)) == 0
    worker.signal(signal.SIGSTOP)
    jobs = [submitter.app.send_task(ADD, [number, 1]).id for number in range(MANY)]
    # One is admitted.
    waiting = submitter.app.platform.sending.ask(lambda ledger: limits.waiting_in_ledger(ledger.client))
    assert waiting == MANY - 1
    worker.signal(signal.SIGCONT)
    rows = [submitter.ended(job) for job in jobs]
    assert [row.state for row in rows] == ["succeeded"] * MANY
    starts = [row.started_at for row in rows]
    assert starts == sorted(starts)
