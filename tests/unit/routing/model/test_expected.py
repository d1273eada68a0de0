"""Expected run times: how people write them, their classes, and their text in a shape."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing import format_versions
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.expected import (
    CLASSES,
    LONGEST_MS,
    SHORTEST_MS,
    UNKNOWN,
    Limits,
    RunTime,
    class_number,
    duration_text,
    expected_class,
    parse_duration,
    within_limits,
)
from celery_capacity.routing.model.request import (
    Request,
    filed_shape,
    run_time_of,
    split_shape,
    split_suffix,
    task_text,
    timed,
    with_request,
)

TIMES = st.integers(0, 2 * LONGEST_MS)
RUN_TIMES = st.builds(lambda expected, more: RunTime(expected, expected + more if expected else 0), TIMES, TIMES)
REQUESTS = st.dictionaries(st.text("abc_.-09", min_size=1, max_size=8), st.integers(0, 10**9), max_size=5).map(
    Request.of
)
NAMES = st.one_of(st.text(min_size=1, max_size=20), st.text("~^,=0123456789%", min_size=1, max_size=12))


@pytest.mark.parametrize(
    ("value", "ms"),
    [
        (90, 90_000),
        (0.5, 500),
        (0.0015, 2),
        ("90", 90_000),
        ("10m", 600_000),
        ("10 min", 600_000),
        ("1h30m", 5_400_000),
        ("2 h", 7_200_000),
        ("1.5h", 5_400_000),
        ("250ms", 250),
        ("1d", 86_400_000),
        (timedelta(minutes=3), 180_000),
    ],
)
def test_duration_is_read_as_people_write_it(value: Any, ms: int) -> None:
    assert parse_duration(value) == ms


@pytest.mark.parametrize(
    "value",
    [
        "",
        "m",
        "soon",
        "10x",
        "10 5m",
        "-1",
        "1h-",
        0,
        -1,
        True,
        float("nan"),
        float("inf"),
        10**400,
        "11w520w",
        None,
        [1],
        10**12,
    ],
)
def test_duration_of_another_form_is_refused_with_its_value(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="expected=") as caught:
        parse_duration(value)
    assert caught.value.advice and "10m" in caught.value.advice


@given(TIMES)
def test_class_is_not_shorter_and_at_most_19_percent_longer(ms: int) -> None:
    its_class = expected_class(ms)
    assert its_class == 0 if ms == 0 else its_class in CLASSES
    if SHORTEST_MS <= ms <= LONGEST_MS:
        assert ms <= its_class <= 1.19 * ms + 1
    assert expected_class(its_class) == its_class
    assert class_number(ms) == (CLASSES.index(its_class) if ms else -1)


@given(TIMES, TIMES)
def test_class_keeps_the_order_of_times(one: int, other: int) -> None:
    assert (one <= other) <= (expected_class(one) <= expected_class(other))


@pytest.mark.parametrize(
    ("expected", "limits", "run_time"),
    [
        (0, Limits(), UNKNOWN),
        (5, Limits(), RunTime(5, 5)),
        (5, Limits(hard=9), RunTime(5, 9)),
        (50, Limits(hard=9), RunTime(9, 9)),
        (50, Limits(hard=9, soft=7), RunTime(7, 9)),
        (50, Limits(soft=7), RunTime(7, 7)),
        (0, Limits(hard=9), RunTime(9, 9)),
        (0, Limits(hard=9, soft=7), RunTime(7, 9)),
    ],
)
def test_time_limits_bound_the_expected_time(expected: int, limits: Limits, run_time: RunTime) -> None:
    assert within_limits(expected, limits) == run_time


@given(REQUESTS, RUN_TIMES, NAMES)
def test_filed_shape_gives_back_its_parts_whatever_the_name(request_: Request, run_time: RunTime, name: str) -> None:
    filed = filed_shape(timed(request_.shape, run_time), name)
    task = "" if name.startswith(("celery.", "platform.")) else task_text(name)
    assert split_shape(filed) == (request_.shape, task, split_suffix(filed)[1])
    bound = expected_class(run_time.bound) if run_time.expected else 0
    assert run_time_of(filed) == (expected_class(run_time.expected), bound)
    assert Request.from_shape(filed) == request_
    other = Request.of({"gpus": 3})
    assert with_request(filed, other) == filed_shape(timed(other.shape, run_time), name)


@given(NAMES)
def test_task_name_fakes_no_run_time(name: str) -> None:
    shape = filed_shape("cpus=1000,slots=1", name)
    assert split_suffix(shape) == (shape, "")
    assert split_shape(shape).suffix == ""


def test_ledger_has_a_new_format_since_shapes_have_run_times() -> None:
    filed = filed_shape(timed("cpus=1000,slots=1", RunTime(1000, 1000)), "task")
    # A process that knows format 2 takes the last part for the task, and fails on an amount without an equals sign.
    amounts = filed.split(",")[:-1]
    assert not all("=" in amount for amount in amounts)
    assert format_versions.LEDGER > 2


@pytest.mark.parametrize(
    ("ms", "words"), [(1500, "1.5 s"), (600_000, "10 min"), (5_400_000, "1 h 30 min"), (90_061_000, "1 d 1 h")]
)
def test_duration_is_shown_in_its_two_largest_units(ms: int, words: str) -> None:
    assert duration_text(ms) == words
