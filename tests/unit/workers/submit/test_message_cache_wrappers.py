"""Wrappers and classes that others put around Celery have their effect on calls that are alike too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any, Final
from unittest import mock

import pytest
from celery import Celery, Task
from celery.app.amqp import AMQP
from celery.app.routes import Router as CeleryRouter
from kombu import serialization
from kombu.exceptions import EncodeError

from celery_capacity.routing.errors import InvalidRequest, NoServers
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.message import Template, decode
from celery_capacity.workers.app.install import create_app, install
from celery_capacity.workers.submit.sender import Sender
from tests.fixtures.jobs.alike import NOWHERE, caught, compare, make_app, run, two

LATER: Final = datetime(2100, 1, 1, tzinfo=UTC)


@pytest.fixture
def app() -> Iterator[Celery]:
    made = make_app()
    with caught():
        yield made


class Bound:
    """The object that `wrapt` gives for a wrapped method: all attributes are those of the method."""

    def __init__(self, method: Any, around: Callable[..., Any]) -> None:
        self._method = method
        self._around = around

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._around(self._method, *args, **options)


class Wrapped:
    """Stand-in for `wrapt.FunctionWrapper`, by which New Relic, ddtrace, Instana and others go around methods."""

    def __init__(self, function: Any, around: Callable[..., Any]) -> None:
        self._function = function
        self._around = around

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)

    def __get__(self, instance: Any, owner: Any) -> Any:
        return Bound(self._function.__get__(instance, owner), self._around)


def traced(numbers: list[int]) -> Callable[..., Any]:
    """Return a wrapper that gives each call a trace of its own."""

    def around(method: Any, *args: Any, **options: Any) -> Any:
        numbers.append(len(numbers))
        return method(*args, **{**options, "headers": {"trace": f"trace-{numbers[-1]}"}})

    return around


def traces(jobs: list[NewJob]) -> list[Any]:
    return [decode(job.message)["headers"].get("trace") for job in jobs]


def test_a_transparent_wrapper_around_apply_async_is_called_each_time(app: Celery) -> None:
    task = app.tasks["free"]
    for _ in range(3):
        task.delay()
    with mock.patch.object(Task, "apply_async", Wrapped(Task.apply_async, traced([]))), caught() as jobs:
        for _ in range(4):
            task.delay()
    assert traces(jobs) == ["trace-0", "trace-1", "trace-2", "trace-3"]


def test_a_transparent_wrapper_around_send_task_is_called_each_time() -> None:
    # New Relic's agent 10 has it so: the wrapper is there before anything of Celery's is made.
    with mock.patch.object(Celery, "send_task", Wrapped(Celery.send_task, traced([]))), caught() as jobs:
        task = make_app().tasks["free"]
        for _ in range(4):
            task.delay()
    assert traces(jobs) == ["trace-0", "trace-1", "trace-2", "trace-3"]


@pytest.mark.parametrize("target", [(AMQP, "as_task_v2"), (CeleryRouter, "route"), (Celery, "send_task")])
def test_method_patched_after_the_first_calls_is_called(app: Celery, target: tuple[Any, str]) -> None:
    task = app.tasks["free"]
    for _ in range(3):
        task.delay()
    with mock.patch.object(*target, autospec=True, side_effect=getattr(*target)) as patched:
        task.delay()
    assert patched.called


def test_replacement_of_send_task_sees_each_call_as_it_was_made(app: Celery) -> None:
    task = app.tasks["free"]
    for _ in range(3):
        task.delay()
    with mock.patch("celery.app.base.Celery.send_task") as patched:
        app.send_task("free", (1,))
        task.delay()
    first, second = patched.call_args_list
    assert first == mock.call("free", (1,))
    assert second.args[:3] == ("free", (), {})
    assert second.kwargs["producer"] is None


class Tenants(Celery):
    """An app with its own `send_task`.

    Celery itself gives all arguments but these by name, so nobody noticed that this method has no others.
    """

    def send_task(self, name: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        return super().send_task(name, args, kwargs, **{**options, "headers": {"tenant": "x"}})


def test_a_send_task_of_an_app_s_own_is_called_as_celery_calls_it() -> None:
    app = Tenants("tenants", set_as_current=False)
    app.task(two, name="two", shared=False)
    install(app, resolve=lambda defaults: defaults.with_urls(*NOWHERE))
    with caught() as jobs:
        for _ in range(3):
            app.tasks["two"].apply_async((1,), countdown=5, eta=None)
        app.send_task("two", (1,), eta=LATER)
    assert all(b'"tenant":"x"' in job.message for job in jobs)
    assert [job.due_at is not None for job in jobs] == [True] * 4


def write_mine(value: Any) -> str:
    return json.dumps(value, default=lambda other: {"__mine__": str(other)})


@pytest.fixture
def own_serialisers() -> Iterator[None]:
    # Kombu's `unregister` takes from a content type the decoder that another serialiser reads it with.
    tables = ("_encoders", "_decoders", "name_to_type", "type_to_name")
    with ExitStack() as stack:
        for table in tables:
            stack.enter_context(mock.patch.dict(getattr(serialization.registry, table)))
        serialization.register("mine", write_mine, json.loads, "application/x-mine", "utf-8")
        serialization.register("mine-too", write_mine, json.loads, "application/json", "utf-8")
        yield


@pytest.mark.usefixtures("own_serialisers")
@pytest.mark.parametrize("serializer", ["mine", "mine-too"])
@pytest.mark.parametrize("said", ["by the app", "by the task", "by the call"])
def test_an_app_s_own_serialiser_writes_each_message(serializer: str, said: str) -> None:
    # Many people have one for their datetimes, and it writes all else as kombu's does.
    app = create_app("own", resolve=lambda defaults: defaults.with_urls(*NOWHERE))
    app.conf.accept_content = ["json", "mine"]
    if said == "by the app":
        app.conf.task_serializer = serializer
    app.task(run, name="mine", shared=False, **({"serializer": serializer} if said == "by the task" else {}))
    options = {"serializer": serializer} if said == "by the call" else {}
    with caught() as jobs:
        for _ in range(3):
            compare(app, jobs, "mine", (1,), None, **options)
        compare(app, jobs, "mine", (LATER,), None, **options)
        compare(app, jobs, "mine", (object,), None, **options)


def nobody(_: Any) -> Any:
    raise NoServers("no servers here")


def test_without_servers_wrong_arguments_are_the_error() -> None:
    app = create_app("alone", resolve=nobody)
    task = app.task(two, name="two", shared=False)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        task.delay()


def test_send_task_can_be_replaced_in_tests_without_servers() -> None:
    app = create_app("alone", resolve=nobody)
    task = app.task(two, name="two", shared=False)
    with mock.patch.object(app, "send_task") as send:
        task.delay(1)
    assert send.called


def test_a_job_that_was_accepted_is_no_error_of_its_call(app: Celery) -> None:
    argument: dict[Any, int] = {"a": 1}
    jobs: list[NewJob] = []

    def store(_: Sender, job: NewJob, attempt: Any) -> None:
        # Another thread might do so, too, while this one waits for Postgres.
        argument[("no", "JSON")] = 1
        jobs.append(job)

    app.tasks["free"].delay()
    with mock.patch.object(Sender, "store", store):
        assert app.tasks["free"].apply_async((argument,), priority=7).id == jobs[0].id


def test_no_arguments_are_kept(app: Celery) -> None:
    for number in range(20):
        app.tasks["free"].apply_async(("x" * 10**6,), time_limit=number + 1)
    kept = sum(len(kind.first.message) for kind in app.platform_templates._kinds.values())
    assert kept < 10**5


def test_options_that_are_other_ones_in_each_call_make_no_templates(app: Celery) -> None:
    # Each template costs as much as one and a half calls, for example with memory=2 * os.path.getsize(path).
    task = app.tasks["free"]
    with mock.patch.object(Template, "of", side_effect=Template.of) as made:
        for number in range(50):
            task.apply_async((1,), memory=2**20 + number)
    assert made.call_count == 0


class Equal(Task):
    """A task with its own notion of being equal, and so no hash."""

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]


class Unready(Task):
    """A task that cannot say what it needs, which Celery's path takes for nothing said."""

    @property
    def memory(self) -> int:
        raise AttributeError("not configured")


@pytest.mark.parametrize("base", [Equal, Unready])
def test_tasks_of_any_class_can_be_called(app: Celery, base: type) -> None:
    app.task(run, name=f"own-{base.__name__}", base=base, shared=False)
    with caught() as jobs:
        for _ in range(3):
            compare(app, jobs, f"own-{base.__name__}", (1,), None)


def test_the_first_of_two_errors_is_the_one_that_celery_meets_first(app: Celery) -> None:
    with caught() as jobs:
        for _ in range(3):
            compare(app, jobs, "free", (1,), None)
        compare(app, jobs, "free", (object(),), None, task_id="a b")


def test_failing_backend_is_heard_before_arguments_that_cannot_be_written(app: Celery) -> None:
    with caught() as jobs:
        for _ in range(3):
            compare(app, jobs, "free", (1,), None)
        with mock.patch.object(app.backend, "on_task_call", side_effect=OSError("away")):
            assert compare(app, jobs, "free", (object(),), None).error[0] is OSError


class Broken(Task):
    """A task that fails where it is asked what it needs."""

    @property
    def gpus(self) -> int:
        raise RuntimeError("not configured")


def test_wrong_arguments_are_the_error_though_the_task_itself_fails_too(app: Celery) -> None:
    app.task(two, name="broken", base=Broken, shared=False)
    with caught() as jobs:
        for args in ((1,), (1,), (), ()):
            compare(app, jobs, "broken", args, None)


@pytest.mark.parametrize("arguments", [({1, 2},), (object(),), ({(1, 2): 3},)])
def test_unwritable_arguments_raise_kombus_error_each_time(app: Celery, arguments: Any) -> None:
    for _ in range(3):
        with pytest.raises(EncodeError) as caught_here:
            app.tasks["free"].apply_async(arguments)
        assert isinstance(caught_here.value, InvalidRequest)
        app.tasks["free"].delay(1)
