"""Lists of jobs: each filter selects what it says, page by page, and the rows are read through an index."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, text

from celery_capacity.routing.inspect import job_list, job_lookup
from celery_capacity.routing.inspect.job_list import JobFilter
from celery_capacity.routing.model.states import State

#: Rows of each of two states; some pages of the test's size.
ROWS = 3000

_INSERT = text(
    """
INSERT INTO jobs (id, name, state, request, shape, queue, worker, root_id, message, submitted_at, finished_at)
SELECT md5(n::text), CASE WHEN n % 100 = 0 THEN 'video.render' ELSE 'mail.send' END,
       CASE WHEN n % 2 = 0 THEN 'succeeded' ELSE 'failed' END, '{"cpus": 1, "slots": 1}', 'cpus=1000,slots=1',
       CASE WHEN n % 10 = 0 THEN 'video' ELSE 'celery' END, 'w' || n % 3, CASE WHEN n % 50 = 0 THEN 'root' END,
       convert_to(CASE WHEN n % 500 = 0 THEN :message ELSE '{}' END, 'UTF8'),
       now() - make_interval(secs => :rows - n), now()
FROM generate_series(1, :rows) AS n
"""
)


@pytest.fixture
def connection(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(job_list, "PAGE", 500)
    monkeypatch.setattr(job_list, "DISORDER", 5.0)
    message = json.dumps({"headers": {"group": 'a"\\b'}}, separators=(",", ":"))
    with engine.connect() as connection:
        connection.execute(_INSERT, {"rows": 2 * ROWS, "message": message})
        connection.execute(text("ANALYZE jobs"))
        yield connection
        connection.rollback()


@pytest.mark.parametrize(
    ("wanted", "condition"),
    [
        (JobFilter(), "true"),
        (JobFilter(states=(State.FAILED,)), "state = 'failed'"),
        (JobFilter(task="video.render"), "name = 'video.render'"),
        (JobFilter(task="v*.r*r"), "name = 'video.render'"),
        (JobFilter(task="video_render"), "false"),
        (JobFilter(task="%"), "false"),
        (JobFilter(states=(State.FAILED,), task="video.render"), "false"),
        (JobFilter(worker="w1", queue="video"), "worker = 'w1' AND queue = 'video'"),
        (JobFilter(group="root"), "root_id = 'root'"),
        (JobFilter(group='a"\\b'), "id IN (SELECT md5(n::text) FROM generate_series(500, 6000, 500) AS n)"),
        (JobFilter(since=1000), "submitted_at >= clock_timestamp() - interval '1000 s'"),
        (JobFilter(since=1000, task="video.*"), "submitted_at > now() - interval '1000 s' AND name LIKE 'video.%'"),
    ],
)
def test_filter_selects_what_a_statement_over_all_rows_does(
    connection: Connection, wanted: JobFilter, condition: str
) -> None:
    query = text(f"SELECT id FROM jobs WHERE {condition} ORDER BY seq DESC")
    expected = list(connection.execute(query).scalars())
    ids = [line["id"] for line in job_list.newest(connection, wanted, 2 * ROWS).lines]
    # A second may pass between two questions about a time.
    assert abs(len(ids) - len(expected)) <= (5 if wanted.since else 0)
    assert ids[: len(expected)] == expected[: len(ids)]
    assert [line["id"] for line in job_list.newest(connection, wanted, 7).lines] == expected[:7]
    assert abs(job_list.count(connection, wanted) - len(expected)) <= (5 if wanted.since else 0)


def test_statements_are_bounded_and_use_the_index(connection: Connection, engine: Engine) -> None:
    statements: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        assert job_list.newest(connection, JobFilter(), 50).lines
        assert job_list.newest(connection, JobFilter(task="video.render", since=600), 50).lines
        assert job_list.count(connection, JobFilter(queue="video", since=600))
        assert job_lookup.with_prefix(connection, "abcd") is not None
    finally:
        event.remove(engine, "before_cursor_execute", note)
    assert len(statements) < 60
    for statement, parameters in statements:
        assert "video" not in statement
        plan = connection.connection.cursor()
        plan.execute(f"EXPLAIN {statement}", parameters)
        lines = "\n".join(row[0] for row in plan.fetchall())
        assert "Seq Scan on jobs " not in lines, f"{statement}\n{lines}"


def test_prefix_names_the_jobs_that_begin_so(connection: Connection) -> None:
    ids = sorted(connection.execute(text("SELECT id FROM jobs")).scalars())
    assert job_lookup.with_prefix(connection, ids[7]) == [ids[7]]
    four = [job for job in ids if job.startswith(ids[7][:4])]
    assert job_lookup.with_prefix(connection, ids[7][:4]) == four[: job_lookup.NAMED]
    assert job_lookup.with_prefix(connection, ids[7][:3]) == []
    assert job_lookup.with_prefix(connection, "%%%%") == []
    assert job_lookup.with_prefix(connection, "zzzzzz") == []
