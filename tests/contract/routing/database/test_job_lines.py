"""Lines of a job's own log in Postgres: in their order, the newest alone, and gone with the job's row."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

import pytest
from sqlalchemy import Engine, text

from celery_capacity.routing.database import job_lines
from celery_capacity.routing.database.job_lines import JobLine, Position
from celery_capacity.routing.store import archive
from tests.fixtures.stores.staged import Stage
from tests.fixtures.waiting import until

AT = datetime(2026, 5, 4, tzinfo=UTC)
#: True while a statement of this database waits for a row.
LOCKED: Final = text(
    "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database())"
)


@pytest.fixture
def stage(stage: Stage) -> Stage:
    stage.worker("a", cpus=4000)
    return stage


def line(job: str, number: int, message: str = "x", attempt: int = 1) -> JobLine:
    return JobLine(job, 1, attempt, number, AT, "INFO", "tasks", message)


def write(stage: Stage, *lines: JobLine, keep: int = 100) -> None:
    with stage.engine.connect() as connection:
        job_lines.write(connection, lines, keep)


def read(
    stage: Stage, job: str, most: int = 100, attempt: int | None = None, after: Position | None = None
) -> list[int]:
    with stage.engine.connect() as connection:
        return [kept.number for kept in job_lines.read(connection, job, most, attempt, after)]


def test_lines_come_back_in_order_whole_and_once(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    lines = [line(job, number, f"line {number}") for number in (1, 2, 3)]
    write(stage, lines[2], lines[0])
    write(stage, *lines)
    write(stage, line("unknown", 1))
    with stage.engine.connect() as connection:
        assert job_lines.read(connection, job, 100) == lines
    assert read(stage, job, most=2) == [2, 3]
    assert read(stage, job, most=1, after=lines[0].position) == [2]
    assert read(stage, job, after=lines[2].position) == []


def test_newest_lines_of_each_job_are_kept(stage: Stage) -> None:
    long, short = stage.submit(cpus=1000), stage.submit(cpus=1000)
    write(stage, *(line(long, number) for number in range(1, 6)), line(short, 1), keep=3)
    assert (read(stage, long), read(stage, short)) == ([3, 4, 5], [1])
    write(stage, line(long, 1, attempt=2), keep=3)
    assert read(stage, long) == [4, 5, 1]
    assert read(stage, long, attempt=2) == [1]


def test_line_has_no_secret_and_any_text(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    write(stage, line(job, 1, "first\npassword: hunter2\n\0 \ud800"), replace(line(job, 2, "y" * 9999), logger="\0"))
    with stage.engine.connect() as connection:
        first, second = job_lines.read(connection, job, 100)
    assert first.message == "first\n***\n\\x00 \\ud800"
    assert (len(second.message), second.logger) == (job_lines.MESSAGE_LENGTH, "\\x00")


def test_lines_go_when_their_job_moves_into_the_archive(stage: Stage) -> None:
    gone, kept = stage.submit(cpus=1000), stage.submit(cpus=1000)
    write(stage, line(gone, 1), line(kept, 1))
    stage.start(gone)
    stage.end(gone)
    with stage.engine.connect() as connection:
        assert archive.archive_finished(connection, 0, archive.CHUNK) == 1
    write(stage, line(gone, 2))
    with stage.engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM job_lines").scalar_one() == 1
    assert read(stage, kept) == [1]


def test_job_is_not_archived_while_lines_of_it_are_written(engine: Engine, stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.end(job)
    with engine.connect() as writer, stage.engine.connect() as archivist:
        with writer.begin():
            job_lines.write(writer, [line(job, 1)], 100)
            assert archive.archive_finished(archivist, 0, archive.CHUNK) == 0
        assert archive.archive_finished(archivist, 0, archive.CHUNK) == 1
        assert archivist.exec_driver_sql("SELECT count(*) FROM job_lines").scalar_one() == 0


def test_lines_of_a_job_that_is_moved_meanwhile_are_not_written(engine: Engine, stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.end(job)
    with engine.connect() as archivist, ThreadPoolExecutor(1) as pool:
        with archivist.begin():
            assert archive.archive_finished(archivist, 0, archive.CHUNK) == 1
            written = pool.submit(write, stage, line(job, 1))
            with stage.engine.connect() as watcher:
                until(lambda: written.done() or watcher.execute(LOCKED).scalar_one(), "the writer waits, or is done")
        written.result()
        assert archivist.exec_driver_sql("SELECT count(*) FROM job_lines").scalar_one() == 0
