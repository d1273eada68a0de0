"""Threads of the operating system beside greenlets, and the things that both want."""

from __future__ import annotations

import json
import subprocess
import sys

from celery_capacity.routing import os_threads
from celery_capacity.routing.config.settings import Settings
from tests.fixtures.processes.forking import ROOT, usual_environment


def test_threads_and_greenlets_share_locks_and_no_connections(settings: Settings) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fixtures.jobs.contending"],
        env={**usual_environment(), "REDIS_URL": str(settings.redis_url)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "counted": 0,
        "waited_beside_a_greenlet_that_computes": True,
        "others_ran_while_a_greenlet_waited": True,
        "time_outs": [False, False, True],
        "woke_each_other": [True, True],
        "connections_of_each": 3,
        "is_of_the_system": True,
    }
    assert "Traceback" not in done.stderr


def test_without_gevent_nothing_is_changed() -> None:
    thread = os_threads.Thread(target=lambda: None)
    thread.start()
    thread.join(60)
    assert not os_threads.is_green()
    assert not thread.is_alive()
