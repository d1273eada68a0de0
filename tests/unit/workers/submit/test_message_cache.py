"""Calls that are alike: a template makes the messages that Celery makes, whatever was changed in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any, Final

import pytest
from celery import Celery
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from celery_capacity.routing.model.job import NewJob
from tests.fixtures.jobs.alike import (
    CHANGES,
    SHOWING,
    TASKS,
    Change,
    caught,
    compare,
    make_app,
)

pytestmark = pytest.mark.filterwarnings("ignore:[\\s\\S]*task attribute is deprecated")

#: Values that JSON can say, and names that show and hide in the texts of arguments.
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


@pytest.fixture
def app() -> Iterator[Celery]:
    made = make_app()
    with caught():
        yield made


def compare_around(
    app: Celery, jobs: list[NewJob], name: str, change: Change, args: Any = SHOWING, **options: Any
) -> None:
    """Compare calls until they are alike, make the change, and compare that call twice more."""
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


@pytest.mark.long(40)
def test_template_makes_celerys_message_after_any_change() -> None:
    run_state_machine_as_test(Changing, settings=settings(stateful_step_count=20, deadline=None))
