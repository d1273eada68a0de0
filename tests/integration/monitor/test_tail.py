"""`tail`: the changes of named jobs until their ends, and those of all jobs until Ctrl-C."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

from celery_capacity.platform.monitor import lines
from celery_capacity.platform.web import transitions
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.inspect import job_list
from celery_capacity.routing.model.states import State
from celery_capacity.workers.process.exit_codes import Exit
from celery_capacity.workers.process.stores import Stores
from tests.fixtures.documents.shapes import assert_shape
from tests.fixtures.processes.commanding import Run
from tests.fixtures.stores.staged import Stage
from tests.fixtures.waiting import until
from tests.integration.monitor.test_tables import NO_POSTGRES, NO_REDIS, platform_environment, run, stage

__all__ = ["platform_environment", "run", "stage"]


@pytest.fixture
def variables(platform_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in platform_environment.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def stores(variables: pytest.MonkeyPatch) -> Iterator[Stores]:
    made = Stores()
    yield made
    made.engine.dispose()
    made.redis.close()


def first_lines(stores: Stores, task: str | None, number: int) -> list[lines.Line]:
    """Return the first changes that are followed, as if Ctrl-C came then."""
    heard: list[lines.Line] = []

    def write(line: lines.Line) -> None:
        heard.append(line)
        if len(heard) == number:
            raise KeyboardInterrupt

    lines.follow_all(stores, task, write)
    return heard


def ids_in(stage: Stage, state: str) -> list[str]:
    with stage.engine.connect() as connection:
        return [line["id"] for line in job_list.newest(connection, job_list.JobFilter((State(state),)), 10).lines]


def test_tail_of_a_job_ends_as_the_job_does(stage: Stage, run: Run) -> None:
    held = ids_in(stage, "running")[0]
    ending = threading.Thread(target=stage.end, args=(held,))
    ending.start()
    followed = run("tail", held, "--json")
    ending.join()
    changes = [json.loads(line) for line in followed.stdout.splitlines()]
    for change in changes:
        assert_shape("tail", change)
    assert (followed.exit_code, changes[-1]["state"], changes[-1]["task"]) == (Exit.OK, "succeeded", "task")
    failed = run("tail", *ids_in(stage, "failed"))
    assert failed.exit_code == Exit.FAILED
    assert failed.stdout.split()[1:4] == ["failed", *ids_in(stage, "failed"), "task"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nothing"], Exit.FAILED, "there is no job nothing"),
        (["--task", "tusk"], Exit.FAILED, "The nearest: task."),
        ([], Exit.USAGE, "name jobs, or --task, or --all"),
        (["job-1", "--all"], Exit.USAGE, "name jobs, or --task, or --all"),
    ],
)
def test_tail_refuses_what_is_not_there(stage: Stage, run: Run, words: list[str], code: Exit, says: str) -> None:
    refused = run("tail", *words, "--json")
    assert refused.exit_code == code
    assert says in json.loads(refused.stdout)["detail"]


def test_tail_of_all_has_each_change_until_ctrl_c(stage: Stage, stores: Stores) -> None:
    def submit() -> None:
        until(lambda: stage.redis.pubsub_numpat() > 0, "somebody listens")
        jobs.append(stage.submit(cpus=2000))
        jobs.append(stage.submit(cpus=2000))

    jobs: list[str] = []
    submitting = threading.Thread(target=submit)
    submitting.start()
    changes = first_lines(stores, "t*k", 2)
    submitting.join()
    assert [(line.job, line.task, line.state) for line in changes] == [
        (jobs[0], "task", "admitted"),
        (jobs[1], "task", "waiting"),
    ]
    assert changes[0].worker == "render-b"


def test_tail_goes_on_from_postgres_without_redis(
    stage: Stage, variables: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables.setattr(transitions, "LOOK", 0.05)
    variables.setenv("REDIS_URL", NO_REDIS)
    stores, ended = Stores(), threading.Event()

    def insert() -> None:
        # The first look shows nothing: until a later one has a change, jobs are inserted.
        while not ended.wait(0.05):
            stage.insert({"cpus": 1000})

    inserting = threading.Thread(target=insert)
    inserting.start()
    try:
        (change,) = first_lines(stores, None, 1)
    finally:
        ended.set()
        inserting.join()
        stores.engine.dispose()
    assert (change.task, change.state) == ("task", "accepted")
    assert "Changes come from Postgres now." in capsys.readouterr().err
    stage.sql("DELETE FROM jobs WHERE state = 'accepted'")


def test_tail_without_any_store_is_an_error(variables: pytest.MonkeyPatch) -> None:
    variables.setattr(transitions, "LOOK", 0.05)
    variables.setenv("REDIS_URL", NO_REDIS)
    variables.setenv("DATABASE_URL", NO_POSTGRES)
    with pytest.raises(StoreUnavailable, match="neither Redis nor Postgres answers"):
        first_lines(Stores(), None, 1)


def test_tail_of_a_task_says_that_postgres_is_away(
    stage: Stage, variables: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def submit() -> None:
        until(lambda: stage.redis.pubsub_numpat() > 0, "somebody listens")
        stage.submit(cpus=2000)

    def say(away: bool, task: str | None) -> None:
        say_away(away, task)
        raise KeyboardInterrupt

    say_away = lines._say_away
    variables.setattr(lines, "_say_away", say)
    variables.setenv("DATABASE_URL", NO_POSTGRES)
    submitting = threading.Thread(target=submit)
    submitting.start()
    assert first_lines(Stores(), "t*k", 1) == []
    submitting.join()
    assert "Postgres does not answer; changes of new jobs are left out" in capsys.readouterr().err


def test_error_of_the_listener_ends_tail(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    def hear(_: transitions.Transitions) -> None:
        raise ZeroDivisionError("a mistake in the listener")

    monkeypatch.setattr(transitions.Transitions, "hear", hear)
    with pytest.raises(ZeroDivisionError, match="a mistake in the listener"):
        lines.follow_all(stores, None, lambda _: None)


def test_slow_output_leaves_changes_out_and_counts_them() -> None:
    heard = lines.Heard()
    for number in range(lines.MAX_PENDING + 3):
        heard.put("job", {"number": number})
    assert (heard.dropped(), heard.dropped()) == (3, 0)
    assert len(heard.take()) == lines.BATCH
