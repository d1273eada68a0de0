"""Jobs as people read them: columns that fit, short ids, spans of time, and values without secrets."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.cells import cell_len

from celery_capacity.platform.console import fitting, job_views
from celery_capacity.platform.console.terminal import SafeConsole
from celery_capacity.routing.inspect.job_list import JobList
from celery_capacity.routing.store.queries import JobFile, JobLine

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SECRET = "hunter2"


def line(number: int = 0, **columns: Any) -> JobLine:
    usual = {
        "id": f"{number:08x}-e3fb-4f71-a177-e89ef6cfe2d5",
        "name": "studio.rendering.tasks.render_frame",
        "state": "succeeded",
        "queue": "celery",
        "attempt": 1,
        "worker": "worker-01",
        "priority": 0,
        "request": {"cpus": 4, "memory": 2**30, "slots": 1},
        "submitted_at": NOW - timedelta(seconds=90),
        "due_at": None,
        "admitted_at": NOW - timedelta(seconds=60),
        "started_at": NOW - timedelta(seconds=59),
        "finished_at": NOW - timedelta(seconds=9),
        "error": None,
        "progress": None,
        "expected_ms": 0,
        "retry_of": None,
        "retried_as": [],
    }
    return JobLine({**usual, **columns})


def listed(*lines: JobLine, width: int = 80, terminal: bool = True, total: int | None = 1) -> str:
    stream = io.StringIO()
    console = SafeConsole(file=stream, force_terminal=terminal, width=width, color_system=None)
    job_views.jobs(console, JobList(lines, NOW), total)
    return stream.getvalue()


LONG = [
    line(1),
    line(2, state="failed", error="ValueError: the texture wood-4k.exr of frame 17 cannot be read: no such file"),
    line(3, queue="video-transcoding", worker="render-node-17.studio.example.org"),
]


@pytest.mark.parametrize("width", [80, 100, 132])
def test_list_fits_the_terminal(width: int) -> None:
    lines = listed(*LONG, width=width).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= width
    assert lines[1].startswith("00000001  stud")
    assert "_frame" in lines[1]


def test_list_fits_the_terminal_with_wide_characters() -> None:
    name = "映像処理.タスク.フレームを描画する処理です"
    lines = listed(line(1, name=name), line(2, worker="作業者の機械その一番目"), width=80).splitlines()
    assert len(lines) == 3
    assert max(map(cell_len, lines)) <= 80
    assert "映像" in lines[1]
    assert "です" in lines[1]


def test_list_has_no_worker_for_a_job_that_waits_after_a_hand_back() -> None:
    rows = listed(line(1, state="waiting", worker="worker-01"), line(2, state="running", worker="worker-02"))
    assert "worker-01" not in rows
    assert "worker-02" in rows


def test_list_is_whole_off_a_terminal() -> None:
    text = listed(*LONG, terminal=False)
    assert "00000002-e3fb-4f71-a177-e89ef6cfe2d5  studio.rendering.tasks.render_frame" in text
    assert "render-node-17.studio.example.org" in text
    assert "video-transcoding" in text


def test_list_has_no_column_that_is_empty_for_all() -> None:
    assert listed(line()).splitlines()[0].split() == ["id", "task", "state", "age", "waited", "ran", "worker"]
    assert "error" in listed(*LONG, width=160).splitlines()[0]


def test_list_says_that_more_may_be_there() -> None:
    assert listed(line(), total=None).splitlines()[-1] == "the newest 1; more with --limit"
    assert listed(line(), total=7).splitlines()[-1] == "the newest 1 of 7; more with --limit"


@pytest.mark.parametrize(
    ("columns", "spans"),
    [
        ({}, (90, 30, 50)),
        ({"state": "running", "finished_at": None}, (90, 30, 59)),
        ({"state": "admitted", "started_at": None, "finished_at": None}, (90, 30, None)),
        # A job that was handed back has times of the attempt that ended.
        ({"state": "waiting", "finished_at": None}, (90, 90, None)),
        ({"state": "scheduled", "finished_at": None, "due_at": NOW + timedelta(hours=1)}, (90, None, None)),
        ({"due_at": NOW - timedelta(seconds=70)}, (90, 10, 50)),
        ({"state": "cancelled", "admitted_at": None, "started_at": None}, (90, 81, None)),
    ],
)
def test_spans_are_those_of_the_state(columns: dict[str, Any], spans: tuple[float | None, ...]) -> None:
    assert tuple(job_views.spans(line(**columns).columns, NOW).values()) == spans


def test_short_ids_tell_the_ids_of_a_list_apart() -> None:
    assert job_views.short_ids(["e4855c54-e3fb-4f71", "e4855c54-e3fc-4f71", "job-1"]) == [
        "e4855c54-e3fb",
        "e4855c54-e3fc",
        "job-1",
    ]
    assert job_views.short_ids([]) == []
    assert job_views.short_ids(["same-id-of-twenty-chars"] * 2) == ["same-id"] * 2


def test_names_are_shortened_in_their_middle() -> None:
    assert fitting.shorten("studio.rendering.tasks.render_frame", 20) == "studio.…render_frame"
    assert fitting.shorten("short", 20) == "short"
    assert cell_len(fitting.shorten("映像処理のフレームを描画する", 12)) == 12
    assert cell_len(fitting.shorten_end("映像処理のフレームを描画する", 12)) == 12


@pytest.mark.parametrize(
    "text",
    [
        "{'password': 'hunter2', 'user': 'me'}",
        "{'db_passwd': \"hunter2\"}",
        "{'API_KEY': 'hunter2 and more'}",
        "{'access_token': b'hunter2'}",
        "('postgresql://me:hunter2@db/x',)",
        "{'secret': 'hunter2...",
        "{'tokens': ['a', 'hunter2']}",
        "{'headers': {'Authorization': 'Bearer hunter2'}}",
        "{'password': '***', 'pwd': 'hunter2'}",
        "login(password=hunter2)",
    ],
)
def test_values_hide_secrets(text: str) -> None:
    shown = job_views.value(text)
    assert SECRET not in shown
    assert "***" in shown


def test_values_are_shortened() -> None:
    assert job_views.value("x" * 1000) == "x" * (job_views.SHOWN_VALUE - 1) + "…"
    assert job_views.value(None) == ""
    for text in ("{'user': 'me'}", "('tokenize.txt',)", "{'password': '***', 'user': 'me'}"):
        assert job_views.value(text) == text


def file_of(attempts: int = 1, epoch: int = 2, **columns: Any) -> JobFile:
    details = {"declared": True, "expires_at": None, **columns}
    each = {
        "worker": "worker-01",
        "admitted_at": NOW - timedelta(seconds=60),
        "started_at": NOW - timedelta(seconds=59),
        "ended_at": NOW,
        "outcome": "handed_back",
        "error": None,
    }
    lines = [JobLine({**each, "epoch": epoch, "attempt": number}) for number in range(1, attempts + 1)]
    return JobFile(line(**details), lines, NOW)


def shown(file: JobFile, **call: str | None) -> str:
    stream = io.StringIO()
    job_views.job(SafeConsole(file=stream, width=120), file, None, call)
    return stream.getvalue()


def test_job_shows_its_call_escaped_and_its_attempts_by_number() -> None:
    text = shown(file_of(2), args="('\x1b[2J',)", kwargs="{}", sender="gen7@desk", result="42")
    assert "args      ('\\x1b[2J',)\n" in text
    assert "sender    gen7@desk\n" in text
    assert "result    42\n" in text
    assert "2.1" not in text
    assert [row.split()[0] for row in text.splitlines()[-2:]] == ["1", "2"]


def test_job_has_its_error_last_and_indented() -> None:
    assert shown(file_of(state="failed", error="Traceback:\n  here\nValueError")).endswith(
        "\nerror\n    Traceback:\n      here\n    ValueError\n"
    )
