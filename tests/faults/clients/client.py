"""A program that submits jobs and may die meanwhile.

    python -m tests.faults.clients.client TRACE COUNT PREFIX [STEP_BY_STEP]

The program prints the number of a job before and after the submission: `try 3`, `took 3`. A reader of its output thus
knows which jobs were accepted. Step by step, it waits after each job until the ledger knows the job.
"""

from __future__ import annotations

import os
import sys

from tests.faults.judging.watching import TASK
from tests.tasks import dying  # noqa: F401  may end this process at a step


def say(line: str) -> None:
    """Write the whole line or nothing.

    `print` writes each word by itself, and this process may be killed between two words.
    """
    os.write(1, f"{line}\n".encode())


def main(trace: str, count: int, prefix: str, step_by_step: str = "") -> None:
    from celery_capacity.platform.celery import app

    for number in range(count):
        say(f"try {number}")
        arguments = (trace, number, 0.02, 1000, "")
        app.send_task(TASK, arguments, cpus=1, task_id=f"{prefix}-{number}")
        if step_by_step:
            app.platform.sending.flush()
        say(f"took {number}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
