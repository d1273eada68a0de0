"""The workflow of a job, from messages that Celery made: chains, groups, chords, replacements and retries."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, chord, group
from sqlalchemy import text

from celery_capacity.platform.web import workflow
from celery_capacity.platform.web.api.workflow_models import Workflow as Model
from celery_capacity.platform.web.pages import graph
from celery_capacity.platform.web.workflow import Workflow
from tests.fixtures.stores.staged import Stage
from tests.integration.web.test_forms import app

__all__ = ["app"]

WRITTEN = pytest.mark.leaves("I2", "I3", "I4", "I6", because="rows end without the ledger", sometimes=True)


def read(stage: Stage, job: str) -> Workflow:
    with stage.engine.connect() as connection:
        return workflow.read(connection, job)


def submit(app: Any, signature: Any) -> Any:
    result = signature.apply_async()
    app.platform.sending.flush()
    return result


def names(seen: Workflow) -> dict[str, str]:
    return {member.id: member.name for member in seen.members.values()}


def links(seen: Workflow) -> set[tuple[str, str, str]]:
    """Return the links by the names of their tasks."""
    name = names(seen)
    return {(name[first], name[second], kind.value) for first, second, kind in seen.links}


def end_all(stage: Stage) -> None:
    """End all jobs, so that nothing waits at the end of the test."""
    stage.sql("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE finished_at IS NULL")


@WRITTEN
def test_chain_shows_its_steps_before_they_are_submitted(stage: Stage, app: Any) -> None:
    task = app.signature
    last = submit(app, chain(task("first", args=[1]), group(task("left"), task("right")), task("last")))
    first = last
    while first.parent is not None:
        first = first.parent
    seen = read(stage, first.id)
    assert {(member.name, member.state) for member in seen.members.values()} == {
        ("first", "accepted"),
        *((name, None) for name in ("left", "right", "last")),
    } or next(iter(seen.members.values())).state == "waiting"
    assert links(seen) == {
        ("first", "left", "child"),
        ("first", "right", "child"),
        ("left", "last", "chord"),
        ("right", "last", "chord"),
    }
    Model.model_validate(seen.to_json())
    end_all(stage)


@WRITTEN
def test_submitted_step_takes_the_place_of_the_announced_one(stage: Stage, app: Any) -> None:
    second = submit(app, chain(app.signature("first"), app.signature("second"), app.signature("third")))
    second = second.parent
    first = second.parent.id
    app.send_task("second", task_id=second.id, root_id=first, parent_id=first)
    child = app.send_task("from_its_body", root_id=first, parent_id=second.id).id
    app.platform.sending.flush()
    for job in (first, second.id, child):
        seen = read(stage, job)
        assert links(seen) == {
            ("first", "second", "child"),
            ("second", "third", "child"),
            ("second", "from_its_body", "child"),
        }
        assert [member.name for member in seen.members.values() if member.state is None] == ["third"]
        assert (seen.root, seen.whole) == (first, True)
    end_all(stage)


@WRITTEN
def test_parts_of_a_chord_are_one_box_with_their_states(stage: Stage, app: Any) -> None:
    parts = [app.signature("part", args=[number]) for number in range(9)]
    result = submit(app, chord(parts, app.signature("body")))
    ids = [part.id for part in result.parent.results]
    stage.sql("UPDATE jobs SET state = 'failed', finished_at = now() WHERE id = :id", id=ids[1])
    seen = read(stage, ids[0])
    assert links(seen) == {("part", "body", "chord")}
    drawn = graph.graph(seen, ids[0])
    assert drawn is not None
    tiles = [(tile.task, tile.number, tile.current, dict(tile.states).get("failed", 0)) for tile in drawn.tiles]
    assert sorted(tiles) == [("body", 1, False, 0), ("part", 1, True, 0), ("part", 8, False, 1)]
    assert {tile.colour for tile in drawn.tiles if tile.number == 8} == {"t-failed"}
    assert {tile.group for tile in drawn.tiles if tile.task == "part"} == {result.parent.id}
    end_all(stage)


@WRITTEN
def test_replacement_and_retries_belong_to_the_story(stage: Stage, app: Any) -> None:
    ids = [submit(app, app.signature("task")).id for _ in range(4)]
    stage.sql("UPDATE jobs SET replaces = :of, root_id = :of, parent_id = :of WHERE id = :id", id=ids[3], of=ids[0])
    for before, after in ((0, 1), (1, 2)):
        stage.sql(
            "INSERT INTO retries (seq, job, of_seq, of_job) SELECT n.seq, n.id, b.seq, b.id FROM jobs n, jobs b"
            " WHERE n.id = :after AND b.id = :before",
            before=ids[before],
            after=ids[after],
        )
    for job in ids[:3]:
        assert [retry for retry, _ in read(stage, job).retries] == ids[:3]
    kinds = {kind.value for *_, kind in read(stage, ids[0]).links}
    assert kinds == {"child", "replaces"}
    assert read(stage, ids[3]).retries == ()
    end_all(stage)


@WRITTEN
def test_archived_jobs_belong_to_the_workflow(stage: Stage, app: Any) -> None:
    root = submit(app, app.signature("root")).id
    child = app.send_task("child", root_id=root, parent_id=root).id
    last = app.send_task("last", root_id=root, parent_id=child).id
    app.platform.sending.flush()
    ended = "UPDATE jobs SET state = 'succeeded', step = 9, finished_at = now() - interval '1 s' WHERE id IN (:a, :b)"
    stage.sql(ended, a=root, b=child)
    stage.sql("SELECT archive_finished(0, 10)")
    with stage.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM jobs_archive")).scalar_one() == 2
    for job in (root, child, last):
        seen = read(stage, job)
        assert links(seen) == {("root", "child", "child"), ("child", "last", "child")}
        assert [seen.members[each].state for each in (root, child)] == ["succeeded", "succeeded"]
        assert (seen.root, seen.whole, list(seen.members)) == (root, True, [root, child, last])
    end_all(stage)


@WRITTEN
def test_workflow_with_more_jobs_than_are_read_is_told(stage: Stage, app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = submit(app, app.signature("root")).id
    for number in range(3):
        submit(app, app.signature("other"))
        app.send_task(f"child {number}", root_id=root, parent_id=root)
    app.platform.sending.flush()
    seen = read(stage, root)
    assert seen.whole
    assert [member.name for member in seen.members.values()] == ["root", "child 0", "child 1", "child 2"]
    monkeypatch.setattr(workflow, "MAX_JOBS", 2)
    seen = read(stage, root)
    assert [member.name for member in seen.members.values()] == ["root", "child 0", "child 1"]
    assert not seen.whole
    end_all(stage)


def test_unreadable_message_and_unknown_job_have_no_steps(stage: Stage) -> None:
    stage.worker("a", cpus=1000)
    job = stage.submit(cpus=1000)
    for message in (b"[]", b'{"body": 7, "headers": [1]}', b'{"body": "W10=", "headers": {"group": 3}}', b"\xff"):
        stage.sql("UPDATE jobs SET message = :message WHERE id = :job", message=message, job=job)
        seen = read(stage, job)
        assert (list(seen.members), seen.links, seen.retries) == ([job], frozenset(), ())
    assert graph.graph(seen, job) is None
    assert read(stage, "nothing").members == {}


def test_workflow_is_read_by_indexes(stage: Stage) -> None:
    values: dict[str, Any] = {"states": ["waiting"], "low": 1, "high": 9, "root": "x", "most": 9, "header": b"x"}
    values |= {"id": "x", "ids": ["x"]}
    columns = workflow._COLUMNS
    statements = {
        workflow._GROUP.format(columns=columns): ["jobs_state_seq"],
        workflow._OF_ROOT.format(columns=columns, table="jobs"): ["jobs_root"],
        workflow._OF_ROOT.format(columns=workflow._ARCHIVED, table="jobs_archive"): ["root_id_seq_idx"],
        workflow._ARCHIVED_BY_ID: ["_id_idx"],
        workflow._BY_ID.format(columns=columns): ["jobs_pkey", "jobs_replaces"],
        workflow._ANCESTORS.text: ["jobs_pkey", "_id_idx"],
    }
    with stage.engine.connect().execution_options(isolation_level="READ COMMITTED") as connection:
        # The tables are nearly empty here, so that to read them whole would be as cheap.
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        for statement, indexes in statements.items():
            plan = "\n".join(connection.execute(text(f"EXPLAIN {statement}"), values).scalars())
            assert [index for index in indexes if index not in plan] == [], plan
            assert "Seq Scan on jobs" not in plan
