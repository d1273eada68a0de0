"""Logs of real workers: lines in JSON, and those of a job that are kept, by `logs`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures import tasks
from tests.fixtures.documents.shapes import assert_shape
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Process
from tests.fixtures.waiting import until

TALK = "tests.tasks.talking.talk"
LINES = [
    ("INFO", "tests.tasks.talking", "frame 7"),
    ("WARNING", "tests.tasks.talking", "slow"),
    ("WARNING", "celery.redirected", "printed"),
    ("INFO", "tests.tasks.talking", "***"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module", params=["prefork", "solo", "gevent"])
def platform(request: pytest.FixtureRequest, server_pair: Pair, folder: Path) -> Iterator[Platform]:
    with standing_platform(server_pair, folder, "tests.tasks.talking") as running:
        worker = running.worker(
            "a", 2, request.param, ready=False, PLATFORM_KEEP_LOGS="100", PLATFORM_LOG_FORMAT="json"
        )
        worker.wait_for(" ready.")
        request.config.stash[_WORKER] = worker
        yield running


_WORKER = pytest.StashKey[Process]()


def lines(platform: Platform, *words: str) -> list[Any]:
    printed = platform.celery("logs", *words, "--json")
    assert printed.returncode == 0, printed.stderr
    return [json.loads(line) for line in printed.stdout.splitlines()]


def test_logs_are_shown_while_the_job_runs_and_followed_to_its_end(
    platform: Platform, submitter: Submitter, request: pytest.FixtureRequest
) -> None:
    job = submitter.send(TALK, "gate")
    tasks.started(platform.redis, "gate")
    until(lambda: len(lines(platform, job)) == 3, "the lines before the gate")
    tasks.let_go(platform.redis, "gate")
    followed = lines(platform, job, "--follow")
    assert [(line["level"], line["logger"], line["message"]) for line in followed] == LINES
    assert [line["number"] for line in followed] == [1, 2, 3, 4]
    assert_shape("logs", followed[0])
    shown = platform.celery("logs", job, "--attempt", "1").stdout
    assert [text.split("  ", 1)[1].split()[0] for text in shown.splitlines()] == [level for level, *_ in LINES]
    assert lines(platform, job, "--attempt", "2") == []

    logged = [json.loads(line) for line in request.config.stash[_WORKER].lines if line.strip()]
    (frame,) = [line for line in logged if line["message"] == "frame 7"]
    assert (frame["job"], frame["attempt"], frame["task"], frame["worker"]) == (job, 1, TALK, "a")


def test_unknown_job_is_refused_and_one_without_lines_is_not(platform: Platform, submitter: Submitter) -> None:
    refused = platform.celery("logs", "no-such-job")
    assert (refused.returncode, refused.stdout) == (Exit.FAILED, "")
    assert "there is no job no-such-job" in refused.stderr
    job = submitter.send("tests.fixtures.tasks.add", 1, 2)
    submitter.ended(job)
    silent = platform.celery("logs", job)
    assert (silent.returncode, silent.stdout) == (0, "")
    assert "PLATFORM_KEEP_LOGS" in silent.stderr


def test_beat_logs_in_json(platform: Platform) -> None:
    beat = platform.beat("--log-format", "json")
    beat.wait_for("Sending due task platform")
    logged = [json.loads(line) for line in beat.lines if line.startswith("{")]
    assert "beat: Starting..." in {line["message"] for line in logged}
    assert {(line["level"], line["logger"]) for line in logged} == {("INFO", "celery"), ("INFO", "celery.beat")}
    # Celery's banner comes before it sets up the logs.
    assert not [line for line in beat.lines if "INFO" in line and not line.startswith("{")]
