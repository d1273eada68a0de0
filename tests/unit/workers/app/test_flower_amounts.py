"""Amounts on Flower's pages: what they show of a task and a worker, and the places in Flower's templates."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flower.command
import pytest

from celery_capacity.workers.app import flower_amounts
from celery_capacity.workers.app.flower_amounts import task_rows, worker_rows

REQUEST = {"cpus": 2, "memory": 2**30, "slots": 1}
HELD = {"worker": "node-1", "attempt": 3, "token": "1.3"}


def task(state: str, **fields: Any) -> Any:
    return SimpleNamespace(state=state, **fields)


def template(name: str) -> str:
    return (Path(flower.command.settings["template_path"]) / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("state", "allocation", "text"),
    [
        ("WAITING", None, "none: it waits"),
        ("ADMITTED", HELD, "2 CPUs, 1 GiB memory on node-1, attempt 3"),
        ("STARTED", HELD, "2 CPUs, 1 GiB memory on node-1, attempt 3"),
        ("SUCCESS", HELD, "none: released"),
        ("RETRY", HELD, "none: released"),
    ],
)
def test_task_shows_request_and_what_it_holds_now(state: str, allocation: Any, text: str) -> None:
    rows = dict(task_rows(task(state, request=REQUEST, allocation=allocation, queue="celery")))
    assert rows == {"Request": "2 CPUs, 1 GiB memory", "Allocation": text, "Queue": "celery"}


def test_task_of_which_no_event_told_shows_nothing() -> None:
    assert task_rows(task("STARTED")) == []


@pytest.mark.parametrize("forged", [{"cpus": "<b>"}, "<b>", {"memory": -1}, []])
def test_forged_request_is_shown_as_it_came(forged: Any) -> None:
    assert task_rows(task("STARTED", request=forged, allocation=HELD))[0] == ("Request", str(forged))


def test_worker_shows_each_resource_and_what_is_free() -> None:
    stats = {
        "capacity": {"cpus": 4, "memory": 2**31, "slots": 4, "licence": 1},
        "allocated": {"cpus": 5, "memory": 2**30, "slots": 1},
    }
    assert worker_rows(stats) == [
        ("CPUs", "4 CPUs", "5 CPUs", "0 CPUs"),
        ("Memory", "2 GiB memory", "1 GiB memory", "1 GiB memory"),
        ("slots", "4 slots", "1 slot", "3 slots"),
        ("licence", "1 licence", "0 licence", "1 licence"),
    ]


def test_worker_without_the_platform_shows_nothing() -> None:
    assert worker_rows({"total": {}}) == []
    assert worker_rows({"capacity": "<b>", "allocated": {}}) == []


def test_forged_amounts_of_a_worker_are_shown_as_they_came() -> None:
    rows = worker_rows({"capacity": {"cpus": "<b>"}, "allocated": {}})
    assert rows == [("all", "{'cpus': '<b>'}", "{}", "–")]


def test_templates_of_flower_have_the_places_of_amounts() -> None:
    places = (("task.html", flower_amounts.TASK_FIELDS), ("worker.html", flower_amounts.WORKER_TAB))
    for name, place in (*places, ("worker.html", flower_amounts.PLACED)):
        assert template(name).count(place) == 1
    assert flower_amounts.TASK_ROWS in flower_amounts.task_page(template("task.html"))
    page = flower_amounts.worker_page(template("worker.html"))
    assert flower_amounts.WORKER_TABLE in page
    assert flower_amounts.ALSO_PLACED in page


def test_template_of_another_flower_stays_as_it_is() -> None:
    assert flower_amounts.task_page("<p></p>") == "<p></p>"
    assert flower_amounts.worker_page("total rusage'") == "total rusage'"
