"""A worker moves finished jobs into the archive by itself, and people still find them there."""

from __future__ import annotations

import json

from sqlalchemy import text

from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until


def test_a_finished_job_leaves_the_table_and_is_still_found(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", pool="threads", PLATFORM_KEEP_FINISHED="0.5")
    job = submitter.send("tests.fixtures.tasks.add", 1, 2)
    waiting = submitter.send("tests.fixtures.tasks.add", 1, 2, cpus=64)
    assert submitter.value(job) == 3

    def archived() -> int:
        with platform.engine.connect() as connection:
            return int(connection.execute(text("SELECT count(*) FROM jobs_archive")).scalar_one())

    until(lambda: archived() == 1, "the job is archived")
    assert submitter.row(job) is None
    assert submitter.row(waiting) is not None
    command = platform.celery("job", job, "--json")
    assert command.returncode == 0, command.stderr
    shown_job = json.loads(command.stdout)
    assert (shown_job["state"], shown_job["worker"], shown_job["why"]["why"]) == ("succeeded", "a", "ended")
    assert [attempt["outcome"] for attempt in shown_job["attempts"]] == ["succeeded"]
    shown = platform.celery("job", job)
    assert shown.returncode == 0, shown.stderr
    assert "succeeded" in shown.stdout
    listed = json.loads(platform.celery("jobs", "--json").stdout)
    assert [line["id"] for line in listed] == [waiting]
    # The books go on as before, and so does a revoke of an ended job.
    submitter.app.control.revoke(job)
    assert platform.celery("verify", "--json").returncode == 0
    assert submitter.app.AsyncResult(job).get(timeout=60) == 3
