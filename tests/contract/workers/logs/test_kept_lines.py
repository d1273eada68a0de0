"""Lines of a job that its worker keeps: those of its body, in batches, and never in its way."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator

import pytest

from celery_capacity.routing.database import job_lines
from celery_capacity.routing.database.job_lines import JobLine
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.execute.run_body import traced
from celery_capacity.workers.logs import kept_lines
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.process.stores import Stores, make_engine
from tests.fixtures.stores.staged import Stage
from tests.fixtures.waiting import until

LOGGER = logging.getLogger("tests.kept")
TASK = logging.getLogger("celery.task.tests")
LIFE = "life"


@pytest.fixture
def stores(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stores]:
    """Return the stores of a worker that keeps 100 lines of each job, with loggers as Celery sets them up."""
    made = Stores()
    made._made.update(settings=dataclasses.replace(stage.settings, keep_logs=100), engine=stage.engine)
    monkeypatch.setattr(logging.getLogger("celery.task"), "propagate", False)
    for name in (LOGGER.name, TASK.name):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.DEBUG)
    kept_lines.begin(made, LIFE)
    yield made
    kept_lines.end(LIFE)


def run(job: str, *messages: str, attempt: int = 1) -> None:
    """Run a body that logs these messages, as a pool does."""

    def trace() -> tuple[int, None, float]:
        for message in messages:
            LOGGER.info("%s", message)
        return 0, None, 0.0

    LOGGER.info("before the body")
    traced(str(Tag(job, Token(1, attempt))), LIFE, trace)
    LOGGER.info("after the body")


def kept(stage: Stage, job: str) -> list[JobLine]:
    with stage.engine.connect() as connection:
        return job_lines.read(connection, job, 100)


def test_password_of_a_url_that_is_cut_is_not_kept(stage: Stage, stores: Stores) -> None:
    job = stage.submit(cpus=1000)
    url = "postgresql://u:S3cretPassword@db/platform"
    shrinks = "password=" + "x" * (2 * job_lines.MESSAGE_LENGTH - 55)
    run(job, f"{shrinks}\n{'a' * 20} {url}", "next")
    until(lambda: len(kept(stage, job)) == 2, "both lines are kept")
    assert "S3cret" not in "".join(line.message for line in kept(stage, job))


def test_level_named_by_a_number_is_kept_as_text(stage: Stage, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logging._levelToName, 25, 7)
    job = stage.submit(cpus=1000)

    def trace() -> tuple[int, None, float]:
        LOGGER.log(25, "strange")
        return 0, None, 0.0

    traced(str(Tag(job, Token(1, 1))), LIFE, trace)
    run(job, "after it", attempt=2)
    until(lambda: len(kept(stage, job)) == 2, "both lines are kept")
    assert [(line.level, line.message) for line in kept(stage, job)] == [("7", "strange"), ("INFO", "after it")]


def test_lines_of_the_body_alone_are_kept(stage: Stage, stores: Stores) -> None:
    job = stage.submit(cpus=1000)

    def trace() -> tuple[int, None, float]:
        LOGGER.info("frame %d", 7)
        TASK.warning("slow")
        try:
            raise ValueError("broken")
        except ValueError:
            LOGGER.exception("failed")
        thread = threading.Thread(target=LOGGER.info, args=("of nobody",))
        thread.start()
        thread.join()
        return 0, None, 0.0

    traced(str(Tag(job, Token(1, 2))), LIFE, trace)
    run(stage.submit(cpus=1000), "of another job")
    kept_lines.end(LIFE)
    lines = kept(stage, job)
    assert [(line.attempt, line.number, line.level, line.logger) for line in lines] == [
        (2, 1, "INFO", LOGGER.name),
        (2, 2, "WARNING", TASK.name),
        (2, 3, "ERROR", LOGGER.name),
    ]
    assert lines[0].message == "frame 7"
    assert lines[2].message.startswith("failed\nTraceback")
    assert lines[2].message.endswith("ValueError: broken")


def test_newest_lines_are_kept_while_postgres_is_away(
    stage: Stage, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_lines, "MAX_PENDING", 3)
    monkeypatch.setattr(kept_lines.LineWriter, "retry_after", (0.01,))
    writer = kept_lines._writers[LIFE]
    stores._made["engine"] = make_engine("postgresql+psycopg2://nobody@127.0.0.1:1/nothing")
    job = stage.submit(cpus=1000)
    with monkeypatch.context() as busy:
        busy.setattr(writer, "_ensure", lambda: True)
        run(job, *(f"line {number}" for number in range(9)))
    assert writer.lost == 6
    writer.wake()
    until(lambda: writer._failed, "a refused batch")
    stores._made["engine"] = stage.engine
    assert writer.flush(60)
    assert [line.number for line in kept(stage, job)] == [7, 8, 9]


def test_nothing_is_attached_without_the_setting(stage: Stage) -> None:
    made = Stores()
    made._made.update(settings=stage.settings)
    kept_lines.begin(made, LIFE)
    block = kept_lines.keeping(Attempt(Tag("job-1", Token(1, 1)), LIFE))
    with block:
        assert not any(isinstance(handler, kept_lines.KeptLines) for handler in logging.getLogger().handlers)
    assert block is kept_lines.keeping(Attempt(Tag("job-2", Token(1, 1)), LIFE))
    assert kept_lines._writers == {}
