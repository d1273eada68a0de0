"""`whatif` on a running platform: its words, its JSON, its refusals, and its forecast beside what happens then."""

from __future__ import annotations

import json

from tests.fixtures.documents.shapes import assert_shape
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until

SLEEP = "demo.sleep"


def test_forecast_has_the_jobs_that_start_then_and_the_change(platform: Platform, submitter: Submitter) -> None:
    platform.worker("a", cpus=2, pool="threads")
    jobs = [submitter.app.send_task(SLEEP, [2.0], cpus=2, expected=2.0).id for _ in range(4)]
    until(lambda: submitter.row(jobs[0]).state == "running" or None, "the first job runs")

    printed = platform.celery("whatif", "--add-worker", "big=4", "--policy", "easy", "--json")
    assert printed.returncode == 0, printed.stderr
    report = json.loads(printed.stdout)
    assert_shape("whatif", report)
    assert (report["source"], report["change"]) == ("ledger", {"add": ["big"], "remove": [], "depth": 1})
    assert report["as_it_is"]["starts"] == report["simulated"] <= 3
    assert report["changed"]["empty_seconds"] <= report["as_it_is"]["empty_seconds"]

    words = platform.celery("whatif", "--remove", "a")
    assert words.returncode == 0, words.stderr
    assert "never: " in words.stdout or "No job waits." in words.stdout
    assert {submitter.ended(job).state for job in jobs} == {"succeeded"}
    assert "No job waits." in platform.celery("whatif").stdout


def test_unknown_worker_policy_or_taken_name_is_refused(platform: Platform) -> None:
    platform.worker("a", cpus=2, pool="threads")
    unknown = platform.celery("whatif", "--remove", "b")
    assert (unknown.returncode, "no such worker lives. Live: a." in unknown.stderr) == (1, True)
    taken = platform.celery("whatif", "--add-worker", "a=4")
    assert (taken.returncode, "a worker of this name lives" in taken.stderr) == (1, True)
    policy = platform.celery("whatif", "--policy", "depth=x")
    assert (policy.returncode, "is no policy" in policy.stderr) == (2, True)
