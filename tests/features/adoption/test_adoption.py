"""Adoption: `install` on an existing app, at any time, and with any classes of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import redis
from celery import Celery, Task, current_app
from sqlalchemy import Engine

from celery_capacity import create_app, install
from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers.broker import beat_messages
from celery_capacity.workers.process.stores import Stores, platform_of
from celery_capacity.workers.submit.router import Router, declaration
from celery_capacity.workers.submit.task import PlatformTask
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until
from tests.tasks import adopted

#: CPUs that each task declares, itself or by the project's base.
DECLARED = {
    "adopted.inherits": 0.5,
    "adopted.declares": 1,
    "adopted.by_class": 1.5,
    "adopted.later": 0.125,
    "adopted.shared": 0.25,
    "adopted.apart": 0.75,
}


@pytest.fixture
def environ(platform_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment of a program that submits to this test's platform."""
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "NODE_NAME", "PLATFORM_IMPORTS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in platform_environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["first", "last"])
def project(request: pytest.FixtureRequest, environ: None) -> Iterator[Celery]:
    app = adopted.make(request.param)
    yield app
    close(app)


def close(app: Celery) -> None:
    app.close()
    stores = platform_of(app)
    stores.sending.close()
    stores.engine.dispose()
    stores.redis.close()


def row(engine: Engine, job: str) -> Any:
    with engine.connect() as connection:
        return connection.exec_driver_sql("SELECT * FROM jobs WHERE id = %s", (job,)).one()


# -- what an app has of its own


def test_task_runs_with_its_declaration_through_the_projects_own_classes(
    platform: Platform, project: Celery, request: pytest.FixtureRequest
) -> None:
    when = request.node.callspec.params["project"]
    platform.app = "tests.tasks.adopted"
    platform.worker("w", cpus=4, pool="threads", slots=4, INSTALLED=when)
    sent = {name: project.tasks[name].delay() for name in DECLARED}
    values = {name: result.get(timeout=60) for name, result in sent.items()}
    for name in ("inherits", "declares"):
        assert values[f"adopted.{name}"] == ["own_task", "own_request", "own_strategy", "own_consumer", name]
    assert (values["adopted.by_class"], values["adopted.later"]) == ("by class", "later")
    assert values["adopted.apart"] == "own_amqp True"
    rows = {name: row(platform.engine, sent[name].id) for name in DECLARED}
    assert {name: job_row.request["cpus"] for name, job_row in rows.items()} == DECLARED
    assert rows["adopted.apart"].request["memory"] == 1024**2
    # A sender that knows only the tasks' names gets the declared requests from the worker.
    stranger = create_app("stranger", resolve=lambda _: platform.settings)
    with closing(stranger):
        by_name = {name: stranger.send_task(name) for name in DECLARED}
        assert [result.get(timeout=60) for result in by_name.values()]
        assert {name: row(platform.engine, result.id).request["cpus"] for name, result in by_name.items()} == DECLARED
    close(stranger)
    # The project's own control class is kept too, and the worker answers it.
    assert project.control.own() == "own_control"
    until(lambda: project.control.ping(timeout=1, limit=1), "the worker answers")


def test_all_that_the_app_kept_is_of_the_platform_now(project: Celery) -> None:
    stores = platform_of(project)
    assert (project.amqp.stores, project.control.stores) == (stores, stores)
    assert isinstance(project.amqp, adopted.OwnAMQP)
    assert isinstance(project.control, adopted.OwnControl)
    assert [type(route) for route in project.amqp.router.routes] == [Router]
    assert issubclass(project.Task, PlatformTask)
    assert issubclass(project.Task, adopted.OwnTask)
    ours = [task for name, task in project.tasks.items() if name.startswith("adopted.")]
    assert {task.name for task in ours} == DECLARED.keys()
    assert all(isinstance(task, PlatformTask) for task in project.tasks.values())
    assert {task.name: declaration(task, 1000)["cpus"] for task in ours} == DECLARED
    assert [task.name for task in ours if task.rerun is False] == ["adopted.apart"]
    assert {entry["task"] for entry in project.conf.beat_schedule.values()} >= beat_messages.NAMES


def test_a_task_of_celerys_own_class_stays_one_of_its_class(project: Celery) -> None:
    task = project.tasks["adopted.by_class"]
    assert isinstance(task, adopted.ByClass)
    assert type(task).__name__ == "ByClass"
    assert task() == "by class"
    assert task.__reduce__()[1][0] == "adopted.by_class"


# -- whenever it is called


def test_a_second_time_changes_nothing(environ: None) -> None:
    app = Celery("twice", set_as_current=False)
    install(app)
    before = (app.platform, app.amqp_cls, app.task_cls, app.send_task, app.amqp)
    assert install(app) is app
    assert before == (app.platform, app.amqp_cls, app.task_cls, app.send_task, app.amqp)


def test_the_current_app_is_installed_by_its_proxy(environ: None) -> None:
    app = Celery("behind", set_as_current=True)
    assert install(current_app) is app
    assert isinstance(app.platform, Stores)


def test_after_a_task_was_sent_the_next_one_is_a_job(
    engine: Engine, redis_client: redis.Redis, settings: Settings, environ: None
) -> None:
    broker = str(settings.redis_url)
    app = Celery("late", broker=broker, backend=broker, set_as_current=False)

    @app.task(name="adopted.late", shared=False, cpus=2)
    def late() -> None: ...

    late.apply_async(queue="queue.elsewhere")
    plain = app.backend
    install(app)
    job = late.delay()
    assert row(engine, job.id).request["cpus"] == 2
    assert app.backend is not plain
    assert redis_client.llen("queue.elsewhere") == 1
    close(app)


def test_queues_that_were_added_before_are_still_there(environ: None) -> None:
    app = Celery("queues", set_as_current=False)
    app.amqp.queues.add("added")
    install(app)
    assert "added" in app.amqp.queues


def test_a_configuration_that_is_read_anew_keeps_the_platforms_defaults(environ: None) -> None:
    app = install(Celery("again", set_as_current=False))
    assert app.conf.worker_consumer == "celery_capacity.workers.execute.consumer:Consumer"
    app.config_from_object({"timezone": "Europe/Berlin", "beat_schedule": {}}, force=True)
    assert app.conf.timezone == "Europe/Berlin"
    assert app.conf.worker_consumer == "celery_capacity.workers.execute.consumer:Consumer"
    assert app.conf.broker_url == platform_of(app).settings.redis_url
    app.finalize()
    app.config_from_object({"beat_schedule": {}}, force=True)
    assert {entry["task"] for entry in app.conf.beat_schedule.values()} == beat_messages.NAMES


def test_configuration_module_wins_over_the_defaults_of_the_platform(environ: None) -> None:
    app = install(Celery("module", set_as_current=False))
    entry = {"task": "adopted.late", "schedule": 60.0}
    theirs = {"WORK_TASK_DEFAULT_QUEUE": "work", "WORK_TASK_ACKS_LATE": True, "WORK_BEAT_SCHEDULE": {"late": entry}}
    app.config_from_object(theirs, namespace="WORK")
    assert (app.conf.task_default_queue, app.conf.task_acks_late) == ("work", True)
    assert app.conf.worker_prefetch_multiplier == 0
    app.finalize()
    assert app.conf.beat_schedule["late"] == entry
    assert {entry["task"] for entry in app.conf.beat_schedule.values()} >= beat_messages.NAMES


def test_configuration_that_computes_its_values_on_reading_still_does(environ: None) -> None:
    class Lazy(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            return super().__getitem__(name)()

    app = install(Celery("lazy", set_as_current=False))
    app.config_from_object(Lazy(task_default_queue=lambda: "work", result_expires=lambda: None))
    assert (app.conf.task_default_queue, app.conf["result_expires"]) == ("work", None)
    assert app.conf.worker_prefetch_multiplier == 0


def test_one_apps_ticks_are_not_anothers(environ: None) -> None:
    app = install(Celery("ours", set_as_current=False))
    app.finalize()
    assert app.conf.beat_schedule
    assert Celery("plain", set_as_current=False).conf.beat_schedule == {}


def test_a_base_of_the_apps_own_declares_for_the_tasks_that_do_not(environ: None) -> None:
    class Heavy(Task):
        abstract = True
        cpus = 8
        rerun = False

    app = install(Celery("bases", task_cls=Heavy, set_as_current=False))

    @app.task(shared=False)
    def heavy() -> None: ...

    @app.task(shared=False, cpus=1, rerun=True)
    def light() -> None: ...

    assert declaration(heavy, 1000) == {"cpus": 8, "slots": 1, "rerun": False}
    assert declaration(light, 1000) == {"cpus": 1, "slots": 1}
