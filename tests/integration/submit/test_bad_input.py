"""Invalid input is refused in the caller, with its value and a valid alternative, before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import Celery
from sqlalchemy import Engine, text

from celery_capacity import InvalidRequest, NotAccepted, NotMigrated, PlatformError, SettingsError, create_app
from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.processes.platforms import FOREIGN, Platform
from tests.tasks import wrong

ADD = "tests.fixtures.tasks.add"


def _everything(client: redis.Redis, engine: Engine) -> tuple[set[Any], int]:
    """Return all keys of Redis, and the number of jobs."""
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT count(*) FROM jobs")).scalar_one()
    return set(client.keys()), rows


@pytest.fixture
def app(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    app = create_app("wrong", resolve=lambda _: settings)
    yield app
    app.close()
    app.platform.engine.dispose()
    app.platform.redis.close()


@pytest.fixture
def refused(app: Celery, redis_client: redis.Redis, engine: Engine) -> Any:
    """Return `refused(send, part of the message...)`: it asserts that `send` raises that error and writes nothing."""

    def check(send: Any, *said: str, error: type[Exception] = InvalidRequest) -> Exception:
        before = _everything(redis_client, engine)
        with pytest.raises(error) as raised:
            send()
        for part in said:
            assert part in str(raised.value)
        assert _everything(redis_client, engine) == before
        return raised.value

    return check


# -- requests


@pytest.mark.parametrize(
    "cpus", [-1, -0.001, float("nan"), float("inf"), float("-inf"), True, False, "4", "", b"4", [4], {}, 1_000_000.001,
             10**30, 0.0001, 2.00005, 4 + 0j]
)  # fmt: skip
def test_cpus_that_are_no_number_of_cpus(app: Celery, refused: Any, cpus: Any) -> None:
    error = refused(lambda: app.send_task(ADD, [1, 2], cpus=cpus), "cpus")
    assert isinstance(error, ValueError)
    assert isinstance(error, PlatformError)
    assert error.advice


@pytest.mark.parametrize(
    "memory", ["2 potatoes", "potatoes", "", "-1GiB", "1e3", "GiB", "1 GiB of it", -1, True, float("nan"), 1.5, [], b""]
)
def test_memory_that_is_no_memory(app: Celery, refused: Any, memory: Any) -> None:
    assert refused(lambda: app.send_task(ADD, [1, 2], memory=memory), "memory").advice


@pytest.mark.parametrize(
    "resources",
    [
        {"Licence": 1},
        {"a b": 1},
        {"x:y": 1},
        {"x=1,cpus": 1},
        {"ü": 1},
        {"": 1},
        {"n" * 65: 1},
        {"cpus": 1},
        {"slots": 2},
        {7: 1},
        {"licence": -1},
        {"licence": 0.5},
        {"licence": True},
        {"licence": "1"},
        {"licence": 10**30},
        {f"r{number}": 1 for number in range(20)},
        ["licence"],
        "licence",
        5,
    ],
)
def test_resources_that_are_none(app: Celery, refused: Any, resources: Any) -> None:
    assert refused(lambda: app.send_task(ADD, [1, 2], resources=resources)).advice


@pytest.mark.parametrize("gpus", [-1, 0.5, True, "1"])
def test_gpus_that_are_no_count(app: Celery, refused: Any, gpus: Any) -> None:
    refused(lambda: app.send_task(ADD, [1, 2], gpus=gpus), "gpus")


@pytest.mark.parametrize("task", [wrong.negative, wrong.potatoes, wrong.listed])
def test_a_declaration_that_is_wrong_is_refused_with_the_first_call(app: Celery, refused: Any, task: Any) -> None:
    refused(app.tasks[task.name].delay)


def test_the_message_names_the_value_and_what_would_be_right(app: Celery, refused: Any) -> None:
    refused(lambda: app.send_task(ADD, [1, 2], memory="2 potatoes"), "2 potatoes", "GiB")
    refused(lambda: app.send_task(ADD, [1, 2], cpus=float("nan")), "nan")
    refused(lambda: app.send_task(ADD, [1, 2], cpus="4"), "'4'")


# -- messages


@pytest.mark.parametrize("priority", [-1, 10, True, 1.5, "high", "5"])
def test_a_priority_outside_0_to_9(app: Celery, refused: Any, priority: Any) -> None:
    refused(lambda: app.send_task(ADD, [1, 2], priority=priority), "priority", "0 to 9")


def test_a_message_above_the_limit(app: Celery, refused: Any) -> None:
    refused(lambda: app.send_task(ADD, ["x" * 1_100_000, ""]), "bytes, 1048576 are allowed", "PLATFORM_MAX_MESSAGE")


@pytest.mark.parametrize("value", [object(), {1, 2}, open])
def test_arguments_that_json_cannot_hold(app: Celery, refused: Any, value: Any) -> None:
    refused(lambda: app.send_task(ADD, [value, 1]), ADD, "json")


def test_an_argument_that_holds_itself(app: Celery, refused: Any) -> None:
    endless: list[Any] = []
    endless.append(endless)
    refused(lambda: app.send_task(ADD, [endless]))


def test_headers_that_json_cannot_hold(app: Celery, refused: Any) -> None:
    refused(lambda: app.send_task(ADD, [1, 2], headers={"mine": object()}), "headers")


@pytest.mark.parametrize("job", ["a b", "a\nb", "x" * 256, "a\0b", "a\tb", 7])
def test_an_id_that_is_none(app: Celery, refused: Any, job: Any) -> None:
    refused(lambda: app.send_task(ADD, [1, 2], task_id=job))


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 256, "a\0b"])
def test_a_name_of_a_task_that_is_none(app: Celery, refused: Any, name: str) -> None:
    refused(lambda: app.send_task(name, [1, 2]))


# -- stores and settings


def test_a_database_without_tables_says_what_to_run(app: Celery, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    with pytest.raises(NotMigrated, match="celery -A platform db upgrade"):
        app.send_task(ADD, [1, 2])


def test_wrong_settings_are_named_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    wrong_ones = {
        "PLATFORM_DEFAULT_CPUS": "-1",
        "PLATFORM_MAX_MESSAGE": "2 potatoes",
        "REDIS_URL": "http://127.0.0.1",
        "NODE_NAME": "a b",
        "PLATFORM_RESOURCES": "Licence=1",
    }
    for name, value in wrong_ones.items():
        monkeypatch.setenv(name, value)
    app = create_app("wrong")
    with pytest.raises(SettingsError) as raised:
        app.send_task(ADD, [1, 2])
    for name in wrong_ones:
        assert name in str(raised.value)
    app.close()


def test_a_postgres_that_does_not_answer_is_named_without_its_password(settings: Settings) -> None:
    away = settings.with_urls(str(settings.redis_url), "postgresql://someone:secret@127.0.0.1:1/nowhere")
    app = create_app("away", resolve=lambda _: away)
    with pytest.raises(NotAccepted) as raised:
        app.send_task(ADD, [1, 2])
    assert "secret" not in str(raised.value)
    app.close()


# -- workers


@pytest.mark.parametrize("name", ["a b", "a:b", "a\nb", "ü"])
def test_a_worker_with_a_bad_name_does_not_start(platform: Platform, name: str) -> None:
    done = platform.celery("worker", "--pool", "solo", NODE_NAME=name)
    assert done.returncode != 0
    assert f"NODE_NAME {name!r} is not valid" in done.stderr
    assert platform.redis.keys("worker:*") == []


def test_a_worker_with_a_bad_name_by_option_does_not_start(platform: Platform) -> None:
    for name in ("a:b@%h", "a b", "x" * 101):
        done = platform.celery("worker", "--pool", "solo", "-n", name)
        assert done.returncode == Exit.CONFIGURATION
        assert name.split("@")[0][:50] in done.stderr
        assert "Traceback" not in done.stderr


def test_a_worker_whose_tasks_declare_nonsense_does_not_start(platform: Platform) -> None:
    done = platform.celery("worker", "--pool", "solo", NODE_NAME="a", PLATFORM_IMPORTS="tests.tasks.wrong")
    assert done.returncode == Exit.CONFIGURATION
    assert "tests.tasks.wrong." in done.stderr
    assert "Traceback" not in done.stderr
    assert platform.redis.keys("worker:*") == []
