"""Marks and options that the platform reads out of Celery's canvas, and writes into it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Celery, chord, group
from celery.canvas import Signature

from celery_capacity.workers.submit.canvas import REPLACES, Chunks, called_by, mark, mark_of, steps_of

app = Celery("canvas", set_as_current=False)


@app.task
def task(*_: Any) -> None:
    """Stand in a canvas; nobody calls it."""


def marks(canvas: Signature) -> list[str | None]:
    """Return the marks of all tasks in a canvas."""
    step_options = [step["options"] for step in steps_of(canvas) if step["task"] == task.name]
    return [(options.get("headers") or {}).get(REPLACES) for options in step_options]


CANVAS = [
    task.s(),
    task.s() | task.s() | task.s(),
    group(task.s(), task.s() | task.s()),
    chord([task.s(), chord([task.s()], task.s())], task.s() | group(task.s(), task.s())),
]


@pytest.mark.parametrize("made", CANVAS, ids=["task", "chain", "group", "chord"])
@pytest.mark.parametrize("sent", [False, True], ids=["made here", "came over the wire"])
def test_every_step_of_a_canvas_is_marked(made: Signature, sent: bool) -> None:
    canvas = json.loads(json.dumps(made)) if sent else made.clone()
    mark(canvas, "job", 2)
    assert set(marks(canvas)) == {"job"}
    assert all(step["options"]["replaced_task_nesting"] == 2 for step in steps_of(canvas) if step["task"] == task.name)
    assert mark_of([None, canvas]) == {REPLACES: "job"}


def test_a_step_of_another_replacement_stays_that() -> None:
    canvas = json.loads(json.dumps(CANVAS[1]))
    canvas["kwargs"]["tasks"][-1]["options"] = {"headers": {REPLACES: "outer"}, "replaced_task_nesting": 5}
    mark(canvas, "inner", 2)
    assert marks(canvas) == ["inner", "inner", "outer"]
    assert canvas["kwargs"]["tasks"][-1]["options"]["replaced_task_nesting"] == 5


def test_headers_that_stand_over_those_of_the_steps_are_marked_too() -> None:
    canvas = group(task.s(), task.s()).set(headers={"tenant": "blue"})
    mark(canvas, "job", 1)
    assert canvas.options["headers"] == {"tenant": "blue", REPLACES: "job"}
    plain = group(task.s(), task.s())
    mark(plain, "job", 1)
    assert "headers" not in plain.options


@pytest.mark.parametrize(
    "strange",
    [
        None,
        1,
        "text",
        [],
        {},
        {"options": None},
        {"options": {}, "subtask_type": "chain", "kwargs": []},
        {"options": {}, "subtask_type": "chord", "kwargs": {"header": [1, None, {}], "body": "text"}},
        {"options": {"headers": ["no", "mapping"]}},
        {"options": {"headers": {REPLACES: 5}}},
    ],
    ids=repr,
)
def test_value_that_is_no_canvas_has_no_mark(strange: Any) -> None:
    assert mark_of([strange]) == {}
    assert mark_of(None) == {}


def test_a_map_names_the_task_that_it_calls() -> None:
    canvas = task.s().set(cpus=2)
    assert called_by("celery.map", {"task": canvas, "it": []}) == (task.name, {"cpus": 2})
    assert called_by("celery.starmap", {"task": dict(task.s()), "it": []}) == (task.name, {})
    for name, kwargs in ((task.name, {"task": canvas}), ("celery.map", None), ("celery.map", {"task": {"task": 5}})):
        assert called_by(name, kwargs) is None


def test_chunks_hand_their_options_on() -> None:
    made = Chunks(task.s(), [(1,), (2,), (3,)], 2, app=app).set(cpus=2, priority=3, task_id="not theirs")
    assert [part.options for part in made.group().tasks] == [{"cpus": 2, "priority": 3}] * 2
