"""The last hour as lines: counted back from the numbers of now, from the rows of jobs, of a bounded number of them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from celery_capacity.platform.web import last_hour
from celery_capacity.platform.web.pages import lines
from tests.fixtures.stores.staged import Stage
from tests.integration.web.test_api import client
from tests.integration.web.test_runs import WRITTEN, History, history

__all__ = ["client", "history"]

#: The cluster of now, as far as the last hour needs it.
SEEN: dict[str, Any] = {"resources": {"allocated_cpus": 3, "waiting_jobs": 1, "total_cpus": 8}}


def read(history: History, seen: dict[str, Any] = SEEN) -> dict[str, Any]:
    with history.stage.engine.connect() as connection:
        return last_hour.read(connection, datetime.fromisoformat(history.moment(0)), seen)


def line(document: dict[str, Any], member: str, seconds: list[float]) -> list[Any]:
    """Return the values of the minutes that many seconds ago."""
    minutes = document["minutes"]
    return [minutes[-1 - int(ago // 60)][member] for ago in seconds]


@WRITTEN
def test_lines_are_counted_back_from_now(history: History) -> None:
    history.ran("a", 1000, 900, 300, cpus=4)
    history.ran("a", 700, 690, None, cpus=3)
    history.waits(400, cpus=9)
    document = read(history)
    assert (len(document["minutes"]), document["whole"]) == (60, True)
    assert line(document, "allocated_cpus", [1200, 800, 500, 100]) == [0, 4, 7, 3]
    assert line(document, "waiting", [1200, 980, 800, 500, 100]) == [0, 1, 0, 0, 1]
    assert line(document, "started_per_second", [870, 500]) == [round(1 / 60, 4), 0]
    assert line(document, "ended_per_second", [290, 200]) == [round(1 / 60, 4), 0]
    assert line(document, "wait_p95_seconds", [870, 670, 100]) == [100, 10, None]


@WRITTEN
def test_more_ends_than_are_read_shorten_the_hour(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_hour, "MAX_ROWS", 3)
    for ago in (3000, 1500, 1200, 600):
        history.ran("a", ago + 20, ago + 10, ago, cpus=1)
    document = read(history)
    assert not document["whole"]
    assert len(document["minutes"]) == 25
    assert sum(minute["ended_per_second"] for minute in document["minutes"]) == pytest.approx(3 / 60, abs=1e-3)


def test_last_hour_is_read_by_indexes(stage: Stage) -> None:
    now = datetime.now(UTC)
    values: dict[str, Any] = {"since": now, "until": now, "open": last_hour.OPEN, "most": 10, "seconds": 60}
    with stage.engine.begin() as connection:
        # The table is small here, so that Postgres would read it whole.
        for way in ("enable_seqscan", "enable_bitmapscan", "enable_sort"):
            connection.exec_driver_sql(f"SET LOCAL {way} = off")
        plan = "\n".join(connection.execute(text(f"EXPLAIN {last_hour._MINUTES}"), values).scalars())
    assert "using jobs_finished on jobs" in plan, plan
    assert "using jobs_state_seq on jobs" in plan, plan
    assert "Seq Scan on jobs" not in plan


def test_page_shows_last_hour_as_lines_and_table(stage: Stage, client: httpx.Client) -> None:
    stage.worker("a", cpus=4000)
    for _ in range(2):
        stage.submit(cpus=3000)
    page = client.get("/").text
    assert page.count('<path class="line') == 6
    assert page.count('<th scope="row">') == 60
    chinese = client.get("/", headers={"Accept-Language": "zh"}).text
    assert "最近一小时" in chinese
    assert client.get("/api/v1/last-hour").json()["minutes"][-1]["waiting"] == 1


def test_line_has_a_gap_where_minutes_have_no_value() -> None:
    values = [None, 1.0, None, 2.0, 4.0]
    minutes = [
        dict.fromkeys(("allocated_cpus", "waiting", "started_per_second", "ended_per_second"), 0) for _ in values
    ]
    for minute, value in zip(minutes, values, strict=True):
        minute.update({"wait_p50_seconds": value, "wait_p95_seconds": None})  # type: ignore[dict-item]
    waits = lines.charts({"minutes": minutes, "total_cpus": 0})[-1]
    assert waits.lines[0].path == "M150.0 75.0h0.1M450.0 50.0h0.1L600.0 0.0"
    assert (waits.lines[0].last, waits.lines[1].path, waits.lines[1].last, waits.top) == ("4", "", "–", "4")
