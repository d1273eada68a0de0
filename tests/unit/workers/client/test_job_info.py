"""A job as a table in a notebook."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from celery_capacity.routing.model.states import State
from celery_capacity.workers.client.job_info import JobInfo, Progress

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)
EVIL = "<img src=x onerror=alert(1)>\"'&"
INFO = JobInfo(
    id="a",
    task="video.cut",
    state=State.WAITING,
    attempt=0,
    worker=None,
    queue="celery",
    priority=3,
    request={"cpus": 4, "slots": 1},
    submitted_at=NOW,
    admitted_at=None,
    started_at=None,
    finished_at=None,
    error=None,
    reason="no-room",
    place=1,
    before=2,
    progress=None,
    retry_of=None,
    retried_as=(),
)


def test_job_is_a_table_of_the_facts_that_there_are() -> None:
    html = INFO._repr_html_()
    assert "no-room, 2 before it" in html
    assert "video.cut" in html
    assert "finished" not in html
    ended = replace(INFO, progress=Progress(3, 10, "frames", NOW), finished_at=NOW)._repr_html_()
    assert "3 of 10 frames" in ended
    assert "finished" in ended


def test_texts_of_a_job_are_escaped_in_its_table() -> None:
    progress = Progress(1, None, EVIL, NOW)
    html = replace(INFO, id=EVIL, task=EVIL, worker=EVIL, queue=EVIL, error=EVIL, progress=progress)._repr_html_()
    assert "<img" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;&amp;") == 6
