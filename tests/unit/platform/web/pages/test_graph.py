"""The graph of a workflow: a column for each step, with jobs that are alike as one tile."""

from __future__ import annotations

import itertools

from celery_capacity.platform.web.pages import graph
from celery_capacity.platform.web.workflow import Link, Member, Workflow


def workflow(links: dict[str, str], **states: str) -> Workflow:
    """Return a workflow of jobs "a", "b", ... by the names of those that follow each."""
    ids = dict.fromkeys([*links, *"".join(links.values())])
    members = {
        job: Member(job, f"task.{job}", states.get(job, "succeeded"), None, number) for number, job in enumerate(ids)
    }
    pairs = frozenset((first, second, Link.CHILD) for first, behind in links.items() for second in behind)
    return Workflow(next(iter(ids)), members, pairs)


def test_each_box_stands_behind_all_that_lead_to_it() -> None:
    drawn = graph.graph(workflow({"a": "bd", "b": "c", "c": "d"}, c="running"), "b")
    assert drawn is not None
    column = {tile.first: tile.x for tile in drawn.tiles}
    assert sorted(column, key=column.__getitem__) == ["a", "b", "c", "d"]
    assert [tile.first for tile in drawn.tiles if tile.current] == ["b"]
    assert {tile.first: tile.colour for tile in drawn.tiles}["c"] == "t-running"
    assert (len(drawn.edges), drawn.left_out) == (4, 0)


def test_circle_and_link_to_itself_are_drawn_too() -> None:
    drawn = graph.graph(workflow({"a": "ab", "b": "a"}), "a")
    assert drawn is not None
    assert (len(drawn.tiles), len(drawn.edges)) == (2, 2)


def test_boxes_around_the_job_are_drawn_of_many() -> None:
    ids = [chr(number) for number in range(0x4E00, 0x4E00 + 200)]
    drawn = graph.graph(workflow(dict(itertools.pairwise(ids))), ids[100])
    assert drawn is not None
    assert (len(drawn.tiles), drawn.left_out) == (graph.MAX_TILES, 200 - graph.MAX_TILES)
    assert {ids[99], ids[100], ids[101]} <= {tile.first for tile in drawn.tiles}
    assert drawn.width < graph.MAX_TILES * 300


def test_job_alone_has_no_graph() -> None:
    assert graph.graph(workflow({"a": ""}), "a") is None
