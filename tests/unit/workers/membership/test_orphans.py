"""Predecessors that a worker ends, and processes that it leaves alone."""

from __future__ import annotations

import os
import signal

from celery_capacity.routing.config import process_identity
from celery_capacity.workers.membership import orphans
from tests.unit.workers.process.test_identity import own_row


def test_predecessor_in_this_very_process_is_left_alone() -> None:
    """Tests run one worker after the other in one process; a worker may leave while its stores are away."""
    pid = os.fork()
    if not pid:
        os._exit(orphans.end_predecessors([own_row()], process_identity.pid_space()))
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
