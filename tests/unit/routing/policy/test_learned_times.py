"""Learned run times: a quantile of decayed runs, which one odd run does not move and a slower task does."""

from __future__ import annotations

import pytest

from celery_capacity.routing.model.expected import CLASSES, class_number, expected_class
from celery_capacity.routing.policy.learned_times import FEWEST, HALF_WEIGHT, Histogram

SECOND, MINUTE = 1000, 60_000


def histogram(*times: int) -> Histogram:
    learned = Histogram()
    for ms in times:
        learned.add({class_number(ms): 1})
    return learned


def test_quantile_is_that_of_four_in_five_runs() -> None:
    runs = histogram(*[SECOND] * 40, *[MINUTE] * 10)
    assert runs.quantile(0.5) == expected_class(SECOND)
    assert runs.quantile(0.99) == expected_class(MINUTE)
    assert runs.spread_ms == runs.quantile(0.8) - runs.quantile(0.2)


def test_few_runs_are_not_believed() -> None:
    assert histogram(*[SECOND] * (FEWEST - 1)).expected_ms == 0
    assert histogram(*[SECOND] * FEWEST).expected_ms == expected_class(SECOND)


def test_time_of_the_shortest_class_is_learned() -> None:
    assert histogram(*[1] * FEWEST).expected_ms == CLASSES[0]


def test_one_odd_run_changes_nothing_and_a_slower_task_is_heard_of() -> None:
    runs = histogram(*[SECOND] * 30)
    runs.add({class_number(60 * MINUTE): 1})
    assert runs.expected_ms == expected_class(SECOND)
    for _ in range(HALF_WEIGHT):
        runs.add({class_number(MINUTE): 1})
    assert runs.expected_ms == expected_class(MINUTE)


def test_time_between_two_classes_does_not_go_to_and_fro() -> None:
    first, second = CLASSES[20], CLASSES[21]
    runs = histogram(*[first] * 20)
    for _ in range(4):
        for ms in (second, first):
            runs.add({class_number(ms): HALF_WEIGHT})
            assert runs.expected_ms == first
    runs.add({22: 4 * HALF_WEIGHT})
    assert runs.expected_ms == CLASSES[22]


def test_large_batch_weighs_no_more_than_its_runs_one_by_one() -> None:
    together, alone = Histogram(), histogram(*[SECOND] * 200)
    together.add({class_number(SECOND): 200})
    assert sum(together.weights.values()) == pytest.approx(sum(alone.weights.values()))
