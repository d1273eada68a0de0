"""The workers of the page of the cluster: filters, groups and pages of a thousand."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

import pytest

from celery_capacity.platform.web.pages import bars, worker_list
from celery_capacity.platform.web.pages.worker_list import Wanted
from celery_capacity.routing.errors import InvalidRequest


def worker(name: str, cpus: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "status": "ready",
        "cpus": cpus,
        "memory": 2**30,
        "slots": 8,
        "allocated_cpus": 1,
        "allocated_memory": 0,
        "allocated_slots": 1,
        "named": {},
        "labels": {},
        "heartbeat_age_seconds": 1.0,
        **more,
    }


WORKERS = [
    worker("a1", labels={"zone": "x"}),
    worker("a2", labels={"zone": "x"}, status="cordoned"),
    worker("b1", cpus=8, labels={"zone": "y"}),
    worker("b2", cpus=8, heartbeat_age_seconds=90.0, named={"gpus": {"total": 2, "allocated": 1}}),
]


def names(**query: str) -> list[str]:
    return [member["name"] for member in worker_list.select(WORKERS, Wanted.of(query), 50).workers]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, ["a1", "a2", "b1", "b2"]),
        ({"name": "b"}, ["b1", "b2"]),
        ({"status": "late"}, ["b2"]),
        ({"status": "ready"}, ["a1", "b1"]),
        ({"label": "zone=x"}, ["a1", "a2"]),
        ({"label": "zone="}, ["b2"]),
        ({"size": "8 CPUs, 1 GiB"}, ["b1"]),
        ({"name": "a", "status": "cordoned"}, ["a2"]),
    ],
)
def test_filter_selects_workers(query: dict[str, str], expected: list[str]) -> None:
    assert names(**query) == expected


def test_pages_of_workers_lead_on_without_gap() -> None:
    workers = [worker(f"w{number:03}") for number in range(120)]
    query, seen = "name=w", []
    while query:
        selection = worker_list.select(workers, Wanted.of(dict(parse_qsl(query))), 50)
        seen += [member["name"] for member in selection.workers]
        query = selection.more
    assert seen == [member["name"] for member in workers]


@pytest.mark.parametrize("by", ["status", "size", "label:zone"])
def test_groups_have_sums_and_lead_to_their_workers(by: str) -> None:
    selection = worker_list.select(WORKERS, Wanted.of({"group": by}), 50)
    assert selection.workers == []
    reached = []
    for group in selection.groups:
        members = worker_list.select(WORKERS, Wanted.of(dict(parse_qsl(group.query))), 50).workers
        assert len(members) == group.workers
        assert group.bars[0].total == str(sum(member["cpus"] for member in members))
        reached += [member["name"] for member in members]
    assert sorted(reached) == names()


@pytest.mark.parametrize(
    ("name", "value"), [("status", "none"), ("group", "colour"), ("label", "zone"), ("name", "x" * 301), ("name", "\0")]
)
def test_wrong_choice_of_workers_is_refused_with_advice(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Wanted.of({name: value})
    assert caught.value.advice


@pytest.mark.parametrize("workers", [1, 10, 50])
def test_segments_of_a_page_are_bounded(workers: int) -> None:
    jobs = [{"id": str(number), "name": "t", "request": {"cpus": 1, "memory": 1, "slots": 1}} for number in range(300)]
    full = worker("a", cpus=300, allocated_cpus=300, allocated_memory=300, allocated_slots=300)
    main, *others = bars.of_worker(full, jobs, workers)
    assert len(main.segments) <= bars.PAGE_SEGMENTS // workers + 1
    assert sum(part.length for part in main.segments) == pytest.approx(bars.LENGTH)
    assert all(len(bar.segments) <= len(main.segments) for bar in others)
