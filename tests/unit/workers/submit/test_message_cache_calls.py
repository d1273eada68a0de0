"""Calls that go by a template, and calls that go through Celery: all that are not ordinary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from celery import Celery, Task, signals
from celery.app.amqp import AMQP
from celery.result import AsyncResult
from kombu import Exchange, Queue

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.app.install import install
from celery_capacity.workers.process.attempts import Attempt, held
from celery_capacity.workers.submit.message_cache import MAX_CHANGES, MAX_KINDS
from tests.fixtures.jobs.alike import (
    NOWHERE,
    caught,
    compare,
    counted,
    deep,
    make_app,
    run,
    two,
)

pytestmark = pytest.mark.filterwarnings("ignore:[\\s\\S]*task attribute is deprecated")


@pytest.fixture
def app() -> Iterator[Celery]:
    made = make_app()
    with caught():
        yield made


def by_celery(app: Celery, call: Callable[[], Any]) -> bool:
    """Return True if Celery makes the message of a call, though others like it came before."""
    for _ in range(3):
        app.tasks["free"].delay(1)
    with counted() as sent:
        call()
    return bool(sent)


@pytest.mark.parametrize(
    "options",
    [{}, {"priority": 3}, {"queue": "video"}, {"cpus": 2, "memory": "1GiB"}, {"ignore_result": True}, {"rerun": False}],
)
@pytest.mark.parametrize("name", ["free", "told", "once"])
def test_calls_that_are_alike_go_by_a_template(app: Celery, name: str, options: dict[str, Any]) -> None:
    task = app.tasks[name]
    with counted() as sent:
        for number in range(10):
            task.apply_async((number,), {"k": number}, **options)
        before = len(sent)
        for number in range(10):
            task.apply_async((number,), {"other": [number]}, task_id=f"mine-{number}", **options)
    assert len(sent) == before


def test_each_call_has_an_id_and_a_result_of_its_own(app: Celery) -> None:
    results = [app.tasks["free"].delay() for _ in range(10)]
    assert len({result.id for result in results}) == 10
    assert all(type(result) is type(results[0]) and result.ignored is False for result in results)
    assert results[9].app is app


@pytest.mark.parametrize(
    "options",
    [
        {"countdown": 5},
        {"expires": 5},
        {"headers": {"a": 1}},
        {"link": []},
        {"unique": "key"},
        {"after": []},
        {"shadow": "other"},
        {"resources": {"licence": 1}},
        {"priority": None},
        {"time_limit": 1.5},
    ],
)
def test_calls_with_other_options_go_through_celery(app: Celery, options: dict[str, Any]) -> None:
    task = app.tasks["free"]
    for _ in range(3):
        task.apply_async((1,), **options)
    assert by_celery(app, lambda: task.apply_async((1,), **options))


@pytest.mark.parametrize("signal", [signals.before_task_publish, signals.after_task_publish, signals.task_sent])
def test_celery_s_signals_are_sent_where_somebody_listens(app: Celery, signal: Any) -> None:
    heard: list[str] = []

    def hear(sender: Any, **_: Any) -> None:
        heard.append(str(sender))

    assert not by_celery(app, app.tasks["free"].delay)
    signal.connect(hear)
    try:
        assert by_celery(app, app.tasks["free"].delay)
    finally:
        signal.disconnect(hear)
    assert heard[-1] == "free"
    assert not by_celery(app, app.tasks["free"].delay)


def test_a_task_that_is_called_at_once_is_not_sent(app: Celery) -> None:
    assert not by_celery(app, app.tasks["free"].delay)
    app.conf.task_always_eager = True
    assert type(app.tasks["free"].delay(1)).__name__ == "EagerResult"


def test_the_event_of_a_task_that_is_sent_is_made_where_it_is_asked_for(app: Celery) -> None:
    assert not by_celery(app, app.tasks["free"].delay)
    app.conf.task_send_sent_event = True
    with mock.patch("celery_capacity.workers.submit.amqp._JobProducer.publish") as publish:
        assert by_celery(app, app.tasks["free"].delay)
    assert publish.call_args_list[-1].kwargs["routing_key"] == "task.sent"


def test_mock_of_celery_is_called_instead_of_a_template(app: Celery) -> None:
    task = app.tasks["free"]
    assert not by_celery(app, task.delay)
    with mock.patch.object(app, "send_task") as send:
        task.delay(1)
    assert send.call_args.kwargs["producer"] is None
    with mock.patch.object(Task, "apply_async") as apply:
        task.delay(1)
    apply.assert_called_once_with((1,), {})
    with mock.patch.object(app.amqp, "send_task_message") as send:
        task.delay(1)
    assert send.call_args.args[1] == "free"
    assert not by_celery(app, task.delay)


@pytest.mark.parametrize(
    "options", [{"task_compression": "gzip"}, {"task_serializer": "yaml", "accept_content": ["yaml"]}]
)
def test_call_goes_through_celery_with_other_serialization(options: dict[str, Any]) -> None:
    app = make_app(**options)
    with caught() as jobs:
        for _ in range(4):
            compare(app, jobs, "free", ("a",), {})


def test_call_within_an_attempt_goes_through_celery(app: Celery) -> None:
    with held(Attempt(Tag("parent", Token(1, 1)), "life", deferred=True)):
        assert by_celery(app, app.tasks["free"].delay)


def test_an_own_router_is_asked_for_each_call(app: Celery) -> None:
    app.amqp.router.routes.append(lambda _, args, *__, **___: {"queue": args[0]})
    with caught() as jobs:
        for queue in ("celery", "celery", "celery", "video"):
            app.tasks["free"].delay(queue)
    assert [job.queue for job in jobs] == ["celery", "celery", "celery", "video"]
    del app.amqp.router.routes[0]
    with caught() as jobs:
        for queue in ("celery", "celery", "celery", "video"):
            app.tasks["free"].delay(queue)
    assert [job.queue for job in jobs] == ["celery", "celery", "celery", "video"]


@pytest.mark.parametrize("routes", [{"fr*": "video"}, {"free": {"queue": "video", "priority": 3}}, {"other": "video"}])
def test_template_is_used_with_routes_by_name(app: Celery, routes: Any) -> None:
    app.conf.task_routes = routes
    app.amqp.flush_routes()
    with caught() as jobs:
        for _ in range(4):
            compare(app, jobs, "free", (1,), {})
    assert not by_celery(app, app.tasks["free"].delay)


@pytest.mark.parametrize(
    "routes", [{"free": {"queue": "video", "headers": {"a": 1}}}, {"free": {"compression": "gzip"}}]
)
def test_routes_that_say_more_go_through_celery(app: Celery, routes: Any) -> None:
    app.conf.task_routes = routes
    app.amqp.flush_routes()
    assert by_celery(app, app.tasks["free"].delay)


def test_a_route_that_says_another_thing_now_is_followed(app: Celery) -> None:
    app.conf.task_routes = {"free": {"queue": "video"}}
    app.amqp.flush_routes()
    with caught() as jobs:
        for _ in range(4):
            compare(app, jobs, "free", (1,), {})
        app.conf.task_routes["free"]["queue"] = "other"
        assert compare(app, jobs, "free", (1,), {}).jobs[0][0].queue == "other"


def test_another_default_queue_is_where_calls_go(app: Celery) -> None:
    app.conf.task_routes = {"free": {"priority": 3}}
    app.amqp.flush_routes()
    with caught() as jobs:
        for _ in range(4):
            compare(app, jobs, "free", (1,), {})
        app.amqp.default_queue = Queue("moved")
        compare(app, jobs, "free", (1,), {})


def test_a_queue_that_others_may_be_bound_like_is_looked_up_for_each_call(app: Celery) -> None:
    app.amqp.queues.add(Queue("celery", Exchange("all", type="topic"), routing_key="all.#"))
    with caught() as jobs:
        for _ in range(3):
            compare(app, jobs, "free", (), {})
        app.amqp.queues.add(Queue("too", Exchange("all", type="topic"), routing_key="all.#"))
        assert compare(app, jobs, "free", (), {}).error


def test_changed_resources_of_a_task_reach_the_next_call(app: Celery) -> None:
    amounts = app.tasks["free"].resources = {"licence": 1}
    with caught() as jobs:
        for _ in range(3):
            compare(app, jobs, "free", (), {})
        amounts["licence"] = 2
        assert "licence=2" in compare(app, jobs, "free", (), {}).jobs[0][0].shape


@pytest.mark.parametrize("task_id", ["a\nb", 5, "x" * 300])
def test_an_id_that_cannot_be_one_is_refused(app: Celery, task_id: Any) -> None:
    with caught() as jobs:
        for _ in range(3):
            compare(app, jobs, "free", (), {})
        assert compare(app, jobs, "free", (), {}, task_id=task_id).error[0] is InvalidRequest


def test_equal_options_of_other_types_have_other_templates(app: Celery) -> None:
    with caught() as jobs:
        for ignored in (1, 1, 1, True, True, True, 0, 0, 0, False, False):
            compare(app, jobs, "free", (), {}, ignore_result=ignored)


@pytest.mark.parametrize(
    "args", [(deep(60),), [object()], ({1: object()},), ("\ud800",), "text", iter([1]), {"a": 1}, 5, (float("nan"),)]
)
def test_arguments_that_cannot_be_sent_are_refused_as_ever(app: Celery, args: Any) -> None:
    with caught() as jobs:
        for _ in range(3):
            compare(app, jobs, "free", (1,), {})
        compare(app, jobs, "free", args, {})


def test_wrong_arguments_are_an_error_of_the_call(app: Celery) -> None:
    task = app.tasks["typed"]
    for _ in range(3):
        task.delay(1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        task.delay()
    task.typing = False
    assert isinstance(task.delay(), AsyncResult)


def test_shown_arguments_hide_secrets(app: Celery) -> None:
    with caught() as jobs:
        for _ in range(4):
            app.tasks["free"].delay("redis://me:hunter2@there/0", password="hunter2")
    assert [b"hunter2" in job.message for job in jobs] == [False] * 4


class OwnAMQP(AMQP):
    """An app's own AMQP: it may do anything."""

    def as_task_v2(self, *args: Any, **options: Any) -> Any:
        message = super().as_task_v2(*args, **options)
        message.headers["own"] = True
        return message


class OwnApp(Celery):
    """An app with its own `send_task`: it may do anything."""

    def send_task(self, *args: Any, **options: Any) -> Any:
        return super().send_task(*args, **{**options, "shadow": "own"})


def test_an_app_with_classes_of_its_own_goes_through_them() -> None:
    app = make_app(amqp=OwnAMQP)
    with caught() as jobs:
        for _ in range(5):
            app.tasks["free"].delay()
    assert all(b'"own":true' in job.message for job in jobs)


@pytest.mark.parametrize("routes", [[], [lambda *_, **__: {"queue": "video"}]])
def test_an_app_without_the_platform_s_router_is_called_as_ever(app: Celery, routes: Any) -> None:
    app.amqp.router.routes[:] = routes
    with caught() as jobs:
        for _ in range(4):
            compare(app, jobs, "free", (1,), {})
    assert by_celery(app, app.tasks["free"].delay)


def test_an_app_that_sends_in_its_own_way_does_so() -> None:
    app = install(OwnApp("own"), resolve=lambda defaults: defaults.with_urls(*NOWHERE))
    task = app.task(two, name="two", typing=False)
    with caught() as jobs:
        for _ in range(5):
            task.delay()
    assert all(b'"shadow":"own"' in job.message for job in jobs)


class OwnTask(Task):
    """A base that people have already."""

    def apply_async(self, *args: Any, **options: Any) -> Any:
        return super().apply_async(*args, **options, headers={"own": True})


def test_a_task_with_a_base_of_its_own_goes_through_that(app: Celery) -> None:
    task = app.task(run, name="own", base=OwnTask)
    with caught() as jobs:
        for _ in range(5):
            task.delay()
    assert all(b'"own":true' in job.message for job in jobs)


class Counting(Task):
    """A task that is a class, as people wrote them once.

    Celery does not look at its arguments.
    """

    name = "counting"

    def run(self, a: Any) -> None:
        """Do nothing: the task is never run here."""


def test_a_task_that_is_a_class_goes_by_a_template_too(app: Celery) -> None:
    task = app.register_task(Counting())
    with caught() as jobs:
        for _ in range(4):
            compare(app, jobs, "counting", (), {"of": "anything"})
    assert not by_celery(app, task.delay)


def test_a_state_that_changes_all_the_time_is_learnt_so_often_and_no_more(app: Celery) -> None:
    task = app.tasks["free"]
    for number in range(MAX_CHANGES + 10):
        task.cpus = number % 7 + 1
        task.delay()
    task.delay()
    assert by_celery(app, lambda: task.apply_async())


def test_run_times_that_are_learned_anew_count_as_no_changes(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    amqp: Any = app.amqp
    task, times = app.tasks["free"], [0]
    monkeypatch.setattr(amqp.job_sender.encoder, "learned_of", lambda *_: times[0])
    for number in range(MAX_CHANGES + 10):
        times[0] = 1000 * (number + 1)
        task.delay()
    assert not by_celery(app, task.delay)


def test_so_many_kinds_are_kept_and_no_more(app: Celery) -> None:
    task = app.tasks["free"]
    for number in range(MAX_KINDS + 10):
        for _ in range(2):
            task.apply_async(time_limit=number + 1)
    made = app.platform_templates
    assert 0 < len(made._kinds) <= MAX_KINDS
    assert len(made._seen) <= MAX_KINDS
