"""`simulate --from-history` on a running platform: its JSON, its words, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

from tests.fixtures.documents.shapes import assert_shape
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform

SLEEP = "demo.sleep"


def test_history_without_a_job_is_refused_with_advice(platform: Platform) -> None:
    platform.celery("db", "upgrade")
    for words in ((), ("--worker", "big=4")):
        refused = platform.celery("simulate", "--from-history", "7d", *words)
        assert refused.returncode == 1, refused.stderr
        assert "no job that came in the last 604,800 s has run and ended" in refused.stderr
        assert "Traceback" not in refused.stderr


def test_history_runs_on_live_workers_and_on_named_ones(
    platform: Platform, submitter: Submitter, tmp_path: Path
) -> None:
    platform.worker("a", cpus=2, pool="threads")
    jobs = [submitter.app.send_task(SLEEP, [0.1], cpus=2, tenant="physics", expected=1.0).id for _ in range(2)]
    jobs += [submitter.app.send_task(SLEEP, [0.1], cpus=1, worker="a", exclusive=True).id]
    assert {submitter.ended(job).state for job in jobs} == {"succeeded"}

    for words, worker in (((), "a"), (("--worker", "big=4", "--tenant", "physics=3"), "big")):
        for expected in ("exact", "recorded", "learned", "none"):
            printed = platform.celery("simulate", "--from-history", "1h", *words, "--expected", expected, "--json")
            assert printed.returncode == 0, printed.stderr
            report = json.loads(printed.stdout)
            assert_shape("simulate", report)
            assert (report["trace"], report["jobs"], report["never"]) == ("history", 3, 0)
            assert [(entry["name"], entry["jobs"]) for entry in report["workers"]] == [(worker, 3)]
            assert {entry["tenant"]: entry["starts"] for entry in report["tenants"]} == {"default": 1, "physics": 2}

    log = tmp_path / "log.csv"
    printed = platform.celery("simulate", "--from-history", "1h", "--log", str(log))
    assert printed.returncode == 0, printed.stderr
    assert "history: 3 jobs" in printed.stdout
    assert len(log.read_text().splitlines()) == 4
    small = platform.celery("simulate", "--from-history", "1h", "--worker", "small=0.5")
    assert (small.returncode, "Traceback" in small.stderr) == (1, False), small.stderr
