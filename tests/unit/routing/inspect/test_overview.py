"""The overview as a value: the sums in it, and the JSON that programs read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from celery_capacity.routing.inspect.overview import Overview, sum_up
from celery_capacity.routing.inspect.waiting import BacklogLine
from celery_capacity.routing.inspect.worker_lines import WorkerLine
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Store

AT = datetime(2026, 1, 2, 3, 4, 5, 678900, UTC)


def _worker(name: str, capacity: dict[str, int], allocated: dict[str, int]) -> WorkerLine:
    return WorkerLine(name, "ready", capacity, allocated, 1.23456, "host", 42, f"{name}-life", "then", "0.1")


def _overview(*workers: WorkerLine, backlog: tuple[BacklogLine, ...] = ()) -> Overview:
    return Overview(Store.LEDGER, AT, workers, backlog, {"admitted": 3}, unapplied=2)


def test_totals_are_the_sums_over_the_workers_in_the_units_of_people() -> None:
    seen = _overview(
        _worker("a", {"cpus": 72_000, "memory": 1000, "slots": 8}, {"cpus": 1500, "memory": 100, "slots": 2}),
        _worker("b", {"cpus": 16_000, "memory": 500, "slots": 4}, {"cpus": 16_000, "memory": 0, "slots": 4}),
    )
    assert seen.to_json()["resources"] == {
        "total_cpus": 88,
        "allocated_cpus": 17.5,
        "available_cpus": 70.5,
        "utilization_percent": 19.89,
        "active_workers": 2,
        "total_memory": 1500,
        "allocated_memory": 100,
        "available_memory": 1400,
        "total_slots": 12,
        "allocated_slots": 6,
        "available_slots": 6,
        "named": {},
        "waiting_jobs": 0,
    }


def test_a_worker_shows_its_own_numbers_and_the_age_of_its_heartbeat() -> None:
    seen = _overview(_worker("a", {"cpus": 500, "slots": 1, "gpus": 2}, {"gpus": 1}))
    assert seen.to_json()["workers"] == [
        {
            "name": "a",
            "status": "ready",
            "cpus": 0.5,
            "allocated_cpus": 0,
            "heartbeat_age_seconds": 1.235,
            "memory": 0,
            "allocated_memory": 0,
            "slots": 1,
            "allocated_slots": 0,
            "named": {"gpus": {"total": 2, "allocated": 1}},
            "queues": ["celery"],
            "hostname": "host",
            "pid": 42,
            "incarnation": "a-life",
            "started_at": "then",
            "version": "0.1",
            "cordon": None,
            "left_seconds": None,
            "labels": {},
        }
    ]


def test_a_worker_shows_the_queues_that_it_serves_and_no_labels_of_them() -> None:
    capacity = Capacity.of({"cpus": 500, "slots": 1}).serving(["video", "mail"])
    (seen,) = _overview(_worker("a", dict(capacity.amounts), {"queue:video": 1})).to_json()["workers"]
    assert (seen["queues"], seen["named"]) == (["mail", "video"], {})


def test_the_backlog_is_told_by_queue_and_request() -> None:
    request = Request.of({"cpus": 4000, "memory": 2**31})
    seen = _overview(backlog=(BacklogLine(request, 12, 33.25), BacklogLine(request.within("video"), 1, None)))
    people = {"cpus": 4, "memory": 2147483648, "slots": 1}
    nothing: dict[str, Any] = {"unknown_task": None, "blocked": None, "where": None, "alternatives": []}
    assert seen.to_json()["backlog"] == [
        {"queue": "celery", "request": people, "waiting": 12, "oldest_seconds": 33.25, **nothing},
        {"queue": "video", "request": people, "waiting": 1, "oldest_seconds": None, **nothing},
    ]
    assert seen.waiting == 13


def test_the_rest_of_the_object_says_where_and_when_it_is_from() -> None:
    seen = _overview().to_json()
    assert (seen["source"], seen["counters"], seen["unapplied"]) == ("ledger", {"admitted": 3}, 2)
    assert seen["at"] == "2026-01-02T03:04:05.678+00:00"


def test_no_worker_is_no_division_by_zero() -> None:
    assert _overview().utilization_percent == 0


def test_a_capacity_that_shrank_below_what_runs_leaves_nothing_available() -> None:
    assert _overview(_worker("a", {"cpus": 1000}, {"cpus": 4000})).available("cpus") == 0


def test_named_resources_are_summed_over_all_workers() -> None:
    seen = _overview(
        _worker("a", {"licence": 3}, {"licence": 1}), _worker("b", {"licence": 2, "gpus": 1}, {"licence": 2})
    )
    assert seen.to_json()["resources"]["named"] == {
        "gpus": {"total": 1, "allocated": 0},
        "licence": {"total": 5, "allocated": 3},
    }


def test_held_shapes_sum_up_by_holder() -> None:
    held = [("a", "cpus=500,slots=1", 3), ("a", "cpus=1000,memory=7,slots=1", 1), ("b", "slots=1", 2)]
    assert sum_up(held) == {"a": {"cpus": 2500, "slots": 4, "memory": 7}, "b": {"slots": 2}}


@pytest.mark.parametrize("workers", [2, 50])
def test_amounts_are_added_up_once_for_all_resources(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    added: list[int] = []
    add_up = amounts.add_up

    def count(vectors: Iterable[Mapping[str, int]]) -> dict[str, int]:
        listed = list(vectors)
        added.append(len(listed))
        return add_up(listed)

    monkeypatch.setattr(amounts, "add_up", count)
    _overview(*(_worker(f"w{n}", {"cpus": 1000, "gpus": 2}, {}) for n in range(workers))).to_json()
    # and once the sums of the workers that have no line
    assert added == [workers + 1, workers + 1]
