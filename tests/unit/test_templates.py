"""Calls that are alike: what a template makes is what Celery makes, whatever was changed in between; and all that is
not ordinary goes through Celery."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final
from unittest import mock

import pytest
from celery import Celery, Task, signals
from celery._state import _task_stack
from celery.app import base as celery_base
from celery.app.amqp import AMQP
from celery.result import AsyncResult
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from kombu import Exchange, Queue

from routing.accept import NewJob, Rate
from routing.gates import KnownRate
from routing.message import Tag
from routing.request_file import RequestRules, Rule
from workers.app import create_app, install
from workers.attempts import Attempt, held
from workers.sender import Sender
from workers.templates import MOST_CHANGES, MOST_KINDS

pytestmark = pytest.mark.filterwarnings("ignore:[\\s\\S]*task attribute is deprecated")

#: Where nobody is: nothing here asks a server.
NOWHERE: Final = ("redis://127.0.0.1:1/0", "postgresql+psycopg2://nobody@127.0.0.1:1/none")
#: What JSON can say, and what shows and hides in the texts of arguments.
VALUES: Final = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES: Final = st.sampled_from(["a", "b", "password", "api_key", "url", "%s", "%(id)s", 'q"'])
LISTS: Final = st.lists(VALUES | st.sampled_from(["redis://me:secret@there/0", "%s", object]), max_size=3)
ARGS: Final = st.none() | LISTS | LISTS.map(tuple)
KWARGS: Final = st.none() | st.dictionaries(NAMES, VALUES, max_size=3)
LATER: Final = datetime(2100, 1, 1, tzinfo=UTC)
OPTIONS: Final = st.fixed_dictionaries(
    {},
    optional={
        "ignore_result": st.sampled_from([True, False, 1, 0, None]),
        "priority": st.sampled_from([0, 3, True, 9, 10, None]),
        "queue": st.sampled_from(["celery", "video", "moved", "other", "no such queue", None]),
        "serializer": st.sampled_from(["json", "yaml", None]),
        "time_limit": st.sampled_from([10, 10.5, True, -1, None]),
        "soft_time_limit": st.sampled_from([5, 20]),
        "cpus": st.sampled_from([1, 2, 0.5, True, "4", -1]),
        "memory": st.sampled_from(["1GiB", 2**20]),
        "resources": st.just({"licence": 1}),
        "rerun": st.booleans(),
        "task_id": st.sampled_from(["mine", "a/b", "", None, 5]),
        "countdown": st.just(0),
        "eta": st.just(LATER),
        "expires": st.just(LATER),
        "headers": st.just({"own": 1}),
        "link": st.none(),
        "unique": st.just("key"),
        "shadow": st.just("another"),
        "group_id": st.just("group"),
        "root_id": st.just("root"),
        "stamped_headers": st.just(["stamp"]),
        "compression": st.just("gzip"),
        "mem": st.just("1GiB"),
    },
)

#: Options with which calls are alike.
SIMPLE: Final = st.fixed_dictionaries(
    {}, optional={"priority": st.sampled_from([0, 3]), "queue": st.just("video"), "cpus": st.sampled_from([1, 2])}
)


def run(*args: Any, **kwargs: Any) -> None:
    """A task."""


def two(a: Any, b: Any = 1) -> None:
    """A task that looks at its arguments."""


def make_app(**options: Any) -> Celery:
    app = create_app("alike", resolve=lambda found: found.with_urls(*NOWHERE), **options)
    app.task(run, name="free")
    app.task(two, name="typed")
    app.task(run, name="told", priority=3, queue="video", cpus=2, memory="1GiB", time_limit=60)
    app.task(run, name="once", rerun=False, ignore_result=True)
    app.finalize()
    return app


@contextmanager
def caught() -> Iterator[list[NewJob]]:
    """The jobs that are sent within, and stored nowhere; no rate is asked for."""
    jobs: list[NewJob] = []

    def store(_: Sender, job: NewJob) -> None:
        jobs.append(job)

    with mock.patch.object(Sender, "store", store), mock.patch("workers.gates.Rates._read"):
        yield jobs


@contextmanager
def counted() -> Iterator[list[int]]:
    """How often Celery sends within."""
    sent: list[int] = []
    plain = celery_base.maybe_list

    def counting(link: Any) -> Any:
        sent.append(1)
        return plain(link)

    with mock.patch.object(celery_base, "maybe_list", counting):
        yield sent


@pytest.fixture
def app() -> Iterator[Celery]:
    made = make_app()
    with caught():
        yield made


class Outcome:
    """What came of a call; two are equal where nobody could tell them apart."""

    def __init__(self, jobs: list[NewJob], call: Callable[[], Any]) -> None:
        jobs.clear()
        self.result: Any = None
        self.error: Any = None
        try:
            result = call()
            self.result = (type(result), result.id, getattr(result, "ignored", None), result.parent)
        except Exception as error:
            self.error = (type(error), str(error))
        self.jobs = [(job, [type(getattr(job, name)) for name in NewJob.__slots__]) for job in jobs]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outcome) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"Outcome({self.result}, {self.error}, {self.jobs})"


def compare(app: Celery, jobs: list[NewJob], name: str, args: Any, kwargs: Any, **options: Any) -> Outcome:
    """The same call as people make it, and past the templates, under one id."""
    task = app.tasks[name]
    with mock.patch.object(celery_base, "uuid", return_value="made"):
        found = Outcome(jobs, lambda: task.apply_async(args, kwargs, **options))
        assert found == Outcome(jobs, lambda: Task.apply_async(task, args, kwargs, **options))
    return found


def alter(*, sender: Any, headers: Any, body: Any, **_: Any) -> None:
    """A receiver of `before_task_publish`."""
    headers["heard"] = len(body[0])


# -- what may change between two calls

#: Attributes of a task, settings of Celery and of the platform.
ATTRIBUTES: Final[dict[str, list[Any]]] = {
    "cpus": [None, 1, 4, 0.5, True, "2", -1],
    "memory": [None, "1GiB", 2**20],
    "gpus": [None, 1],
    "resources": [None, {"licence": 2}],
    "rerun": [True, False, "no"],
    "ignore_result": [True, False, 1],
    "unique": [None, True],
    "unique_for": [None, 5],
    "rate_limit": [None, "10/s"],
    "time_limit": [None, 10],
    "soft_time_limit": [None, 20, 100],
    "priority": [None, 5],
    "queue": [None, "moved"],
    "_exec_options": [None],
    "typing": [True, False],
    "shadow_name": [lambda *_: None, lambda *_: "shadow"],
}
SETTINGS: Final[dict[str, list[Any]]] = {
    "task_default_queue": ["celery", "video", "other"],
    "task_repr_maxlevels": [1, 3],
    "task_create_missing_queues": [True, False],
    "task_serializer": ["json", "yaml"],
    "task_default_priority": [None, 7],
}
PLATFORM: Final[dict[str, list[Any]]] = {"max_message": [900, 10**7], "default_cpus": [7000]}
QUEUES: Final = [
    Queue("moved", Exchange("moved", type="direct"), routing_key="moved"),
    Queue("celery", Exchange("all", type="topic"), routing_key="celery.#"),
    Queue("other", alias="celery"),
    Queue("video"),
]
#: What is changed, for an app and the name of a task; what it returns takes it back again, where nothing else does.
Change = Callable[[Celery, str], Callable[[], object] | None]


def attribute(name: str, value: Any) -> Change:
    return lambda app, task: setattr(app.tasks[task], name, value)


def setting(name: str, value: Any) -> Change:
    return lambda app, _: setattr(app.conf, name, value)


def of_platform(name: str, value: Any) -> Change:
    def change(app: Celery, _: str) -> None:
        app.platform._made["settings"] = replace(app.platform.settings, **{name: value})

    return change


def shown(most: int) -> Change:
    def change(app: Celery, _: str) -> None:
        app.amqp.argsrepr_maxsize = app.amqp.kwargsrepr_maxsize = most

    return change


def routed(routes: Any) -> Change:
    def change(app: Celery, _: str) -> None:
        app.conf.changes.pop("task_routes", None)
        if routes is not None:
            app.conf.task_routes = routes
        app.amqp.flush_routes()
        app.amqp.__dict__.pop("router", None)

    return change


def one_more_route(app: Celery, _: str) -> None:
    app.amqp.router.routes.append(lambda *_, **__: {"queue": "video"})


def queued(queue: Queue) -> Change:
    return lambda app, _: app.amqp.queues.add(queue) and None


def ruled(pattern: str, cpus: int) -> Change:
    def change(app: Celery, _: str) -> None:
        app.platform._made["requests"] = RequestRules((Rule(pattern, {"cpus": cpus}, None),))

    return change


def rated(per_second: float) -> Change:
    def change(app: Celery, task: str) -> None:
        app.amqp.job_sender.rates._known = {task: KnownRate(Rate(per_second, "5/s"), by_control=True)}

    return change


def listened(*_: Any) -> Callable[[], object]:
    signals.before_task_publish.connect(alter)
    return lambda: signals.before_task_publish.disconnect(alter)


def made_anew(app: Celery, _: str) -> None:
    app.__dict__.pop("amqp", None)


def in_an_attempt(*_: Any) -> Callable[[], object]:
    stack = ExitStack()
    stack.enter_context(held(Attempt(Tag("parent", 1, 1), "life")))
    return stack.close


def in_a_task(app: Celery, name: str) -> Callable[[], object]:
    parent = app.tasks[name]
    parent.push_request(id="parent", root_id="root", called_directly=False, delivery_info={"priority": 2})
    _task_stack.push(parent)

    def back() -> None:
        _task_stack.pop()
        parent.pop_request()

    return back


CHANGES: Final[dict[str, Change]] = {
    **{f"task.{name} {value}": attribute(name, value) for name, found in ATTRIBUTES.items() for value in found},
    **{f"conf.{name} {value}": setting(name, value) for name, found in SETTINGS.items() for value in found},
    **{f"settings.{name} {value}": of_platform(name, value) for name, found in PLATFORM.items() for value in found},
    **{f"queue {number}": queued(queue) for number, queue in enumerate(QUEUES)},
    **{f"shown {most}": shown(most) for most in (10, 1024)},
    **{f"rules {pattern}": ruled(pattern, 3) for pattern in ("free", "t*", "nothing")},
    **{f"rate {per_second}": rated(per_second) for per_second in (0.0, 5.0)},
    "routes as ever": routed(None),
    "routes by name": routed({"free": {"queue": "video", "priority": 1}}),
    "routes by pattern": routed({"*": "other"}),
    "one more route": one_more_route,
    "a listener": listened,
    "another AMQP": made_anew,
    "an attempt": in_an_attempt,
    "a task that runs": in_a_task,
}
TASKS: Final = ("free", "typed", "told", "once")
#: What shows which levels and how many characters of arguments are shown.
SHOWING: Final = ("redis://me:secret@there/0", [[[[1]]]])


def compare_around(
    app: Celery, jobs: list[NewJob], name: str, change: Change, args: Any = SHOWING, **options: Any
) -> None:
    """Calls that become alike, then the change, and the same call twice."""
    for _ in range(3):
        compare(app, jobs, name, args, None, **options)
    back = change(app, name)
    try:
        for _ in range(2):
            compare(app, jobs, name, args, None, **options)
    finally:
        if back is not None:
            back()
    compare(app, jobs, name, args, None, **options)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("change", CHANGES)
def test_each_change_makes_the_difference_that_it_makes_with_celery(app: Celery, change: str, name: str) -> None:
    with caught() as jobs:
        compare_around(app, jobs, name, CHANGES[change])


class Changing(RuleBasedStateMachine):
    """Changes and calls, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.app = make_app()
        self.jobs = self.stack.enter_context(caught())

    def teardown(self) -> None:
        self.stack.close()

    @rule(name=st.sampled_from(TASKS), args=ARGS, kwargs=KWARGS, options=OPTIONS)
    def call(self, name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> None:
        for _ in range(3):
            compare(self.app, self.jobs, name, args, kwargs, **options)

    @rule(name=st.sampled_from(TASKS), args=ARGS, kwargs=KWARGS)
    def call_as_it_is(self, name: str, args: Any, kwargs: Any) -> None:
        for _ in range(3):
            compare(self.app, self.jobs, name, args, kwargs)

    @rule(name=st.sampled_from(TASKS), change=st.sampled_from(list(CHANGES)), options=SIMPLE)
    def change(self, name: str, change: str, options: dict[str, Any]) -> None:
        compare_around(self.app, self.jobs, name, CHANGES[change], **options)


def test_whatever_changes_in_between_a_template_makes_what_celery_makes() -> None:
    run_state_machine_as_test(Changing, settings=settings(stateful_step_count=20, deadline=None))


# -- what goes by a template, and what does not


def by_celery(app: Celery, call: Callable[[], Any]) -> bool:
    """Whether Celery makes the message of a call, though others like it came before."""
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
    with mock.patch("workers.amqp._JobProducer.publish") as publish:
        assert by_celery(app, app.tasks["free"].delay)
    assert publish.call_args_list[-1].kwargs["routing_key"] == "task.sent"


def test_what_a_test_puts_in_the_place_of_celery_is_called_as_ever(app: Celery) -> None:
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


def test_wrong_arguments_are_an_error_of_the_call(app: Celery) -> None:
    task = app.tasks["typed"]
    for _ in range(3):
        task.delay(1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        task.delay()
    task.typing = False
    assert isinstance(task.delay(), AsyncResult)


def test_what_is_shown_of_arguments_leaves_out_what_looks_secret(app: Celery) -> None:
    with caught() as jobs:
        for _ in range(4):
            app.tasks["free"].delay("redis://me:hunter2@there/0", password="hunter2")
    assert [b"hunter2" in job.message for job in jobs] == [False] * 4


class OwnAMQP(AMQP):
    """An app's own: it may do anything."""

    def as_task_v2(self, *args: Any, **options: Any) -> Any:
        found = super().as_task_v2(*args, **options)
        found.headers["own"] = True
        return found


class OwnApp(Celery):
    """The same."""

    def send_task(self, *args: Any, **options: Any) -> Any:
        return super().send_task(*args, **{**options, "shadow": "own"})


def test_an_app_with_classes_of_its_own_goes_through_them() -> None:
    app = make_app(amqp=OwnAMQP)
    with caught() as jobs:
        for _ in range(5):
            app.tasks["free"].delay()
    assert all(b'"own":true' in job.message for job in jobs)


def test_an_app_that_sends_in_its_own_way_does_so() -> None:
    app = install(OwnApp("own"), resolve=lambda found: found.with_urls(*NOWHERE))
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
    own = app.task(run, name="own", base=OwnTask)
    with caught() as jobs:
        for _ in range(5):
            own.delay()
    assert all(b'"own":true' in job.message for job in jobs)


def test_a_state_that_changes_all_the_time_is_learnt_so_often_and_no_more(app: Celery) -> None:
    task = app.tasks["free"]
    for number in range(MOST_CHANGES + 10):
        task.cpus = number % 7 + 1
        task.delay()
    task.delay()
    assert by_celery(app, lambda: task.apply_async())


def test_so_many_kinds_are_kept_and_no_more(app: Celery) -> None:
    task = app.tasks["free"]
    for number in range(MOST_KINDS + 10):
        for _ in range(2):
            task.apply_async(time_limit=number + 1)
    made = app.platform_templates
    assert 0 < len(made._kinds) <= MOST_KINDS
    assert len(made._learnt) <= MOST_KINDS
