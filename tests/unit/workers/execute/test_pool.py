"""The end of a process whose bodies still run in threads."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: A thread takes a lock for ever, and the process ends.
ENDING = """
import logging, sys, threading
from types import SimpleNamespace
from celery_capacity.workers.execute.pool import end_process

logging.basicConfig(stream=sys.stdout, format="%(message)s")
taken = threading.Event()

def body():
    if sys.argv[1:]:
        logging.root.handlers[0].acquire()
    taken.set()
    threading.Event().wait()

threading.Thread(target=body).start()
taken.wait()
print("last words")
end_process(SimpleNamespace(pool=SimpleNamespace(executor=object()), pidlock=None), 3)
"""


@pytest.mark.parametrize("locked", [False, True])
def test_process_ends_though_a_body_holds_the_lock_of_the_log(locked: bool) -> None:
    arguments = ["locked"] if locked else []
    ended = subprocess.run([sys.executable, "-c", ENDING, *arguments], stdout=subprocess.PIPE, text=True, timeout=120)
    assert ended.returncode == 3
    assert locked or ended.stdout == "last words\n"
