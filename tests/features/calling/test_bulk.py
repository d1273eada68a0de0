"""Many jobs at once: `app.submit_many`, and the groups and chords that go by the same chunks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Task, chord, group
from celery.signals import after_task_publish, before_task_publish
from sqlalchemy import Connection, text

from celery_capacity import InvalidRequest, LeaseLost, NotAccepted, PartlyAccepted, create_app
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.insert import bulk
from celery_capacity.routing.model import message
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.attempts import Attempt
from celery_capacity.workers.submit import chunk_writer
from celery_capacity.workers.submit.message_cache import MessageCache
from celery_capacity.workers.submit.router import Router
from celery_capacity.workers.submit.task import PlatformTask
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until
from tests.tasks.bulky import double, spread
from tests.tasks.canvas import total

#: Headers that differ between two messages of one task.
OWN = ("id", "root_id", "argsrepr", "kwargsrepr")


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("bulk")
    with standing_platform(server_pair, folder, "tests.tasks.bulky", "tests.tasks.canvas") as running:
        running.worker("a", cpus=4, pool="threads", slots=8)
        yield running


@pytest.fixture
def app(submitter: Submitter) -> Any:
    submitter.app.set_current()
    return submitter.app


def rows(platform: Platform, name: str = double.name, state: str = "%") -> int:
    query = text("SELECT count(*) FROM jobs WHERE name = :name AND state LIKE :state")
    with platform.engine.connect() as connection:
        return int(connection.execute(query, {"name": name, "state": state}).scalar_one())


def headers(submitter: Submitter, job: str) -> dict[str, Any]:
    envelope = message.decode(bytes(submitter.row(job).message))
    kept = {**envelope["headers"], **envelope["properties"]}
    return {name: value for name, value in kept.items() if name not in (*OWN, "correlation_id")}


def test_many_jobs_run_in_their_order_and_are_found_by_one_small_handle(app: Any, submitter: Submitter) -> None:
    stored: list[int] = []
    handle = app.submit_many(double, ((n,) for n in range(25)), kwargs={"by": 3}, chunk=10, progress=stored.append)
    assert stored == [10, 20, 25]
    assert len(handle) == 25
    assert [result.id for result in handle] == list(handle.ids())
    assert [result.get(timeout=60) for result in handle] == [3 * n for n in range(25)]
    assert [result.id for result in handle[3:5]] == [handle.id(3), handle[4].id]
    assert handle[-1].id == handle.id(24)
    with pytest.raises(IndexError):
        handle[25]
    job_rows = [submitter.row(job) for job in handle.ids()]
    assert [row.seq for row in job_rows] == sorted(row.seq for row in job_rows)


def test_each_message_is_the_one_that_apply_async_sends(app: Any, submitter: Submitter) -> None:
    options: dict[str, Any] = {"memory": "1GiB", "priority": 7, "time_limit": 50, "headers": {"tenant": "x"}}
    single = double.apply_async((1,), {"by": 2}, **options)
    many = app.submit_many(double, [(1,), (2,), (3,)], kwargs={"by": 2}, **options)
    by_name = app.submit_many("not.known", [(1,), (2,)], priority=7)
    alike = headers(submitter, single.id)
    assert alike["tenant"] == "x"
    assert [headers(submitter, job) for job in many.ids()] == [alike] * 3
    for job in many.ids():
        row, own_headers = submitter.row(job), message.decode(bytes(submitter.row(job).message))["headers"]
        assert (row.priority, row.shape, row.root_id) == (7, submitter.row(single.id).shape, job)
        assert (own_headers["id"], own_headers["root_id"]) == (job, job)
    assert [
        json.loads(message.body_of(message.decode(bytes(submitter.row(job).message))))[:2] for job in many.ids()
    ] == [[[n], {"by": 2}] for n in (1, 2, 3)]
    assert [submitter.row(job).priority for job in by_name.ids()] == [7, 7]
    assert [submitter.row(job).declared for job in by_name.ids()] == [False, False]
    for job in (*many.ids(), single.id):
        assert submitter.ended(job).state == "succeeded"
    for job in by_name.ids():
        submitter.until(job, "waiting")


def test_what_is_the_same_for_all_is_made_once(app: Any, submitter: Submitter, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    plain = Router.__call__

    def ask(self: Router, name: str, *more: Any, **options: Any) -> Any:
        asked.append(name)
        return plain(self, name, *more, **options)

    monkeypatch.setattr(Router, "__call__", ask)
    handle = app.submit_many(double, ((n,) for n in range(25)), chunk=10)
    assert asked == [double.name]
    assert [result.get(timeout=60) for result in handle] == [2 * n for n in range(25)]


def test_progress_draws_bars_of_submissions_and_of_results(
    app: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # Rich takes the captured output for a terminal
    jobs = app.submit_many(double, [(n,) for n in range(3)], progress=True)
    assert "3/3" in capsys.readouterr().err
    parts = group(double.s(n) for n in range(4)).apply_async()
    assert parts.get(timeout=60, progress=True) == [0, 2, 4, 6]
    assert "4/4" in capsys.readouterr().err
    heard: dict[str, int] = {}
    assert not parts.get(timeout=60, progress=True, callback=heard.__setitem__)
    assert sorted(heard.values()) == [0, 2, 4, 6]
    monkeypatch.delenv("FORCE_COLOR")
    capsys.readouterr()
    assert parts.get(timeout=60, progress=True) == [result.get(timeout=60) for result in parts.results]
    app.submit_many(double, [(1,)], progress=True)[0].get(timeout=60)
    assert capsys.readouterr().err == ""
    assert [result.get(timeout=60) for result in jobs] == [0, 2, 4]


def test_submit_many_stores_all_where_the_interpreter_starts_no_thread(
    app: Any, submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("concurrent.futures.thread._shutdown", True)
    stored: list[int] = []
    handle = app.submit_many(double, [(n,) for n in range(25)], chunk=10, progress=stored.append)
    assert stored == [10, 20, 25]
    assert [result.get(timeout=60) for result in handle] == [2 * n for n in range(25)]


def test_what_stands_around_a_call_sees_each_job(
    app: Any, submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = app.tasks[double.name]
    for holder in (task, type(task), PlatformTask, Task):
        seen: list[Any] = []
        plain = holder.apply_async

        def look(*args: Any, plain: Any = plain, seen: list[Any] = seen, **options: Any) -> Any:
            seen.append(options["task_id"])
            return plain(*args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(holder, "apply_async", look)
            handle = app.submit_many(task, [(1,), (2,), (3,)])
        assert seen == list(handle.ids()), holder


def test_a_put_off_bulk_waits_for_its_time(app: Any, submitter: Submitter) -> None:
    handle = app.submit_many(double, [(1,), (2,)], countdown=3600, expires=7200)
    job_rows = [submitter.row(job) for job in handle.ids()]
    assert [row.state for row in job_rows] == ["scheduled"] * 2
    assert all(3500 < (row.due_at - row.submitted_at).total_seconds() <= 3601 for row in job_rows)
    assert all(7000 < (row.expires_at - row.submitted_at).total_seconds() <= 7201 for row in job_rows)
    for result in handle:
        result.revoke()
    assert [submitter.ended(job).state for job in handle.ids()] == ["cancelled"] * 2


def test_signals_are_sent_once_for_each_message_and_after_it_is_stored(app: Any, submitter: Submitter) -> None:
    before: list[str] = []
    after: list[tuple[str, bool]] = []

    def change(headers: dict[str, Any], **_: Any) -> None:
        before.append(headers["id"])
        headers["note"] = f"seen {len(before)}"

    def look(headers: dict[str, Any], **_: Any) -> None:
        after.append((headers["id"], submitter.row(headers["id"]) is not None))

    before_task_publish.connect(change)
    after_task_publish.connect(look)
    try:
        handle = app.submit_many(double, [(1,), (2,), (3,)], chunk=2)
        together = group(double.s(n) for n in range(3)).apply_async()
    finally:
        before_task_publish.disconnect(change)
        after_task_publish.disconnect(look)
    ids = [*handle.ids(), *(result.id for result in together.results)]
    assert before == ids
    assert after == [(job, True) for job in ids]
    assert [headers(submitter, job)["note"] for job in ids] == [f"seen {n}" for n in range(1, 7)]
    assert together.get(timeout=60) == [0, 2, 4]
    assert [result.get(timeout=60) for result in handle] == [2, 4, 6]


def test_while_one_chunk_is_stored_only_the_next_one_is_built(app: Any, submitter: Submitter) -> None:
    chunk, most = 5, 0
    stored = [0]

    def numbers() -> Iterator[tuple[int]]:
        nonlocal most
        for number in range(100):
            most = max(most, number + 1 - stored[-1])
            yield (number,)

    handle = app.submit_many(double, numbers(), chunk=chunk, progress=stored.append)
    assert stored[1:] == list(range(chunk, 101, chunk))
    assert most <= 2 * chunk
    assert [result.get(timeout=60) for result in handle] == [2 * n for n in range(100)]


def test_next_chunk_is_stored_while_the_ledger_takes_one(
    app: Any, submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, bring = bulk.copy_jobs, chunk_writer.to_ledger
    stored: list[str] = []
    brought: list[str] = []
    stored_before: list[int] = []
    second = threading.Event()

    def copied(connection: Any, jobs: Any, *more: Any) -> bool:
        done = copy(connection, jobs, *more)
        stored.extend(job.id for job in jobs)
        if len(stored) > 5:
            second.set()
        return done

    def taken(sender: Any, jobs: Any, *more: Any) -> None:
        assert second.wait(60), "no chunk is stored beside the one that the ledger takes"
        stored_before.append(len(stored) - len(brought))
        brought.extend(job.id for job in jobs)
        bring(sender, jobs, *more)

    monkeypatch.setattr(bulk, "copy_jobs", copied)
    monkeypatch.setattr(chunk_writer, "to_ledger", taken)
    handle = app.submit_many(double, ((n,) for n in range(40)), chunk=5)
    assert brought == stored == list(handle.ids())
    assert max(stored_before) <= 10, "there are two chunks of rows at the most on their way"
    assert [result.get(timeout=60) for result in handle] == [2 * n for n in range(40)]


def test_a_listener_that_comes_late_hears_of_later_messages(app: Any, submitter: Submitter) -> None:
    heard: list[str] = []

    def hear(headers: Any = None, **_: Any) -> None:
        heard.append(headers["id"])

    def numbers() -> Iterator[tuple[int]]:
        for number in range(12):
            if number == 6:
                after_task_publish.connect(hear)
            yield (number,)

    try:
        handle = app.submit_many(double, numbers(), chunk=5)
    finally:
        after_task_publish.disconnect(hear)
    assert heard == list(handle.ids())[6:]
    assert [result.get(timeout=60) for result in handle] == [2 * n for n in range(12)]


def test_a_filled_message_is_the_one_that_celery_makes(
    app: Any, submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [(1,), ('"', {"%(id)s": "\\"}), ({"password": "x"}, "é")]
    filled = app.submit_many(double, calls, cpus=900, priority=3)
    monkeypatch.setattr(MessageCache, "like", lambda *_: None)
    made = app.submit_many(double, calls, cpus=900, priority=3)
    for job, other in zip(filled.ids(), made.ids(), strict=True):
        text = bytes(submitter.row(job).message)
        assert text.replace(job.encode(), other.encode()) == bytes(submitter.row(other).message)
        shapes = [(row.shape, row.priority, row.name, row.declared) for row in map(submitter.row, (job, other))]
        assert shapes[0] == shapes[1]
    for job in (*filled.ids(), *made.ids()):
        app.control.revoke(job)


def test_what_is_wrong_with_all_is_refused_before_anything_is_written(app: Any, platform: Platform) -> None:
    before = rows(platform)
    endless = iter(lambda: (1,), None)
    for wrong, expected_text in (
        ({"cpus": -1}, "cpus"),
        ({"priority": 11}, "priority"),
        ({"chunk": 0}, "chunk"),
        ({"task_id": "x"}, "task_id"),
        ({"kwargs": {"by": object()}}, "cannot be written"),
    ):
        with pytest.raises(InvalidRequest, match=expected_text):
            app.submit_many(double, endless, **wrong)
    with pytest.raises(InvalidRequest, match="item 0, 7, is not valid"):
        app.submit_many(double, [7])
    with pytest.raises(TypeError, match="missing 1 required"):
        app.submit_many(double, [()])
    assert rows(platform) == before
    assert len(app.submit_many(double, [])) == 0


@pytest.mark.parametrize("chunk", [2, 100])
def test_an_error_in_the_middle_leaves_what_came_before_it(
    app: Any, submitter: Submitter, platform: Platform, chunk: int
) -> None:
    before = rows(platform)
    stored: list[int] = []
    with pytest.raises(PartlyAccepted, match="5 jobs were accepted") as wrong:
        app.submit_many(double, [*((n,) for n in range(5)), (object(),), (6,)], chunk=chunk, progress=stored.append)
    assert isinstance(wrong.value.__cause__, InvalidRequest)
    assert (wrong.value.accepted, wrong.value.unknown, stored[-1]) == (5, (), 5)
    assert rows(platform) == before + 5

    def broken() -> Iterator[tuple[int]]:
        yield (1,)
        raise OSError("the file ends here")

    with pytest.raises(PartlyAccepted) as wrong:
        app.submit_many(double, broken(), chunk=chunk)
    assert isinstance(wrong.value.__cause__, OSError)
    with pytest.raises(PartlyAccepted, match="1 jobs were accepted"):
        group([double.s(1), double.s(object()), double.s(3)]).apply_async()
    assert rows(platform) == before + 7
    until(lambda: submitter.allocated_cpus() == "0", "all of them ran")


def test_a_commit_whose_answer_is_lost_stores_nothing_twice(
    app: Any, submitter: Submitter, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, committed, lost = rows(platform), bulk.committed, [1]

    def losing(connection: Connection, jobs: Any) -> Any:
        if lost and lost.pop():
            mine = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
            with platform.engine.connect() as other:
                other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": mine})
        return committed(connection, jobs)

    monkeypatch.setattr(bulk, "committed", losing)
    handle = app.submit_many(double, [(n,) for n in range(6)], chunk=3)
    assert rows(platform) == before + 6
    assert [result.get(timeout=60) for result in handle] == [2 * n for n in range(6)]


def test_a_store_that_takes_no_more_says_how_many_it_took(
    app: Any, submitter: Submitter, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, copy, chunks = rows(platform), bulk.copy_jobs, []

    def refused_at_the_second(connection: Connection, jobs: Any, by: Any = None) -> bool:
        chunks.append(len(jobs))
        if len(chunks) == 2:
            connection.execute(text("SELECT 1 / 0"))
        return copy(connection, jobs, by)

    monkeypatch.setattr(bulk, "copy_jobs", refused_at_the_second)
    with pytest.raises(PartlyAccepted) as wrong:
        app.submit_many(double, ((n,) for n in range(100)), chunk=10)
    assert isinstance(wrong.value.__cause__, NotAccepted)
    # A chunk that was built meanwhile is not stored after the failed chunk.
    assert (wrong.value.accepted, wrong.value.unknown, chunks) == (10, (), [10, 10])
    assert rows(platform) == before + 10
    until(lambda: submitter.allocated_cpus() == "0", "all of them ran")


def test_without_a_ledger_the_rows_are_accepted_and_a_sweep_brings_them_in(
    app: Any, platform: Platform, submitter: Submitter
) -> None:
    settings = platform.settings.with_urls("redis://127.0.0.1:1/0", str(platform.settings.database_url))
    alone = create_app("alone", resolve=lambda _: settings)
    try:
        app.set_current()
        handle = alone.submit_many("tests.tasks.bulky.double", [(n,) for n in range(5)])
        assert [submitter.ended(job).state for job in handle.ids()] == ["succeeded"] * 5
    finally:
        alone.platform.sending.close()
        alone.platform.engine.dispose()


# -- groups and chords


def test_a_large_group_goes_in_chunks_and_keeps_its_order(
    app: Any, submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks: list[int] = []
    copy = bulk.copy_jobs

    def counted(connection: Connection, jobs: Any, by: Any = None) -> bool:
        chunks.append(len(jobs))
        return copy(connection, jobs, by)

    monkeypatch.setattr(bulk, "copy_jobs", counted)
    result = group([double.s(n) for n in range(1050)]).apply_async(priority=2)
    assert chunks == [1000, 50]
    assert result.get(timeout=60) == [2 * n for n in range(1050)]
    job_rows = [submitter.row(part.id) for part in result.results]
    assert [row.seq for row in job_rows] == sorted(row.seq for row in job_rows)
    assert {row.priority for row in job_rows} == {2}


def test_a_chord_whose_header_goes_in_chunks_counts_each_part(app: Any, submitter: Submitter) -> None:
    nested = group(double.s(n) for n in range(4)) | total.s()
    body = chord([*(double.s(n) for n in range(1020)), nested, double.s(1) | double.s()])(total.s())
    assert body.get(timeout=60) == 2 * sum(range(1020)) + 12 + 4
    assert submitter.ended(body.id).attempt == 1


@pytest.mark.parametrize("kind", ["group", "chord"])
def test_the_first_parts_run_while_a_generator_makes_the_others(app: Any, platform: Platform, kind: str) -> None:
    def parts() -> Iterator[Any]:
        for number in range(5):
            if number == 4:
                until(lambda: rows(platform, state="succeeded") > before, "the first has run")
            yield double.s(number)

    before = rows(platform, state="succeeded")
    if kind == "group":
        assert group(parts()).apply_async().get(timeout=60) == [0, 2, 4, 6, 8]
    else:
        assert chord(parts(), total.s()).apply_async().get(timeout=60) == 20


def test_jobs_added_while_an_aged_chunk_is_stored_are_stored_at_their_age(
    app: Any, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, added, copy = threading.Event(), threading.Event(), bulk.copy_jobs
    before, chunks = rows(platform), []

    def slow(connection: Connection, jobs: Any, by: Any = None) -> bool:
        chunks.append(len(jobs))
        began.set()
        assert added.wait(60)
        return copy(connection, jobs, by)

    def parts() -> Iterator[Any]:
        yield double.s(0)
        yield double.s(1)
        assert began.wait(60)
        yield double.s(2)
        yield double.s(3)
        added.set()
        until(lambda: rows(platform) > before + chunks[0], "a job that came during the store is stored")

    monkeypatch.setattr(bulk, "copy_jobs", slow)
    assert group(parts()).apply_async().get(timeout=60) == [0, 2, 4, 6]


def test_signals_are_sent_while_a_generator_goes_on(app: Any, platform: Platform) -> None:
    """Jobs come faster than they are stored, so that the thread finds some each time."""
    sent: list[str] = []

    def look(headers: dict[str, Any], **_: Any) -> None:
        sent.append(headers["id"])

    def parts() -> Iterator[Any]:
        for number in range(900):
            if sent:
                return
            time.sleep(0.005)
            yield double.s(number)

    after_task_publish.connect(look)
    try:
        together = group(parts()).apply_async()
    finally:
        after_task_publish.disconnect(look)
    ids = [result.id for result in together.results]
    assert sent == ids
    assert len(ids) < 900
    together.get(timeout=60)


def test_an_error_of_a_generator_leaves_the_parts_that_run(app: Any, submitter: Submitter, platform: Platform) -> None:
    def parts() -> Iterator[Any]:
        for number in range(9):
            yield double.s(number)
            if number == 3:
                until(lambda: rows(platform) > before, "the first is stored")
        raise RuntimeError("no more")

    before = rows(platform)
    with pytest.raises(PartlyAccepted, match="no more") as raised:
        group(parts()).apply_async()
    assert raised.value.accepted == rows(platform) - before
    assert raised.value.accepted in range(1, 9)


def test_a_group_that_was_sent_before_is_not_doubled(app: Any, platform: Platform) -> None:
    signatures = [double.s(n).set(task_id=f"again-{n}") for n in range(3)]
    assert group(signatures).apply_async().get(timeout=60) == [0, 2, 4]
    before = rows(platform)
    again = group([*signatures, double.s(3)]).apply_async()
    assert rows(platform) == before + 1
    assert again.get(timeout=60) == [0, 2, 4, 6]


# -- inside a task


def test_a_task_submits_many_as_its_children(app: Any, submitter: Submitter) -> None:
    parent = spread.delay(5)
    ids = parent.get(timeout=60)
    assert len(set(ids)) == 10
    for job in ids:
        row = submitter.ended(job)
        assert (row.state, row.parent_id, row.root_id) == ("succeeded", parent.id, parent.id)
    assert submitter.ended(parent.id).state == "succeeded"


def test_an_attempt_that_lost_its_lease_submits_nothing(app: Any, submitter: Submitter, platform: Platform) -> None:
    job = double.delay(1)
    row = submitter.ended(job.id)
    before = rows(platform)
    stale = Attempt(Tag(job.id, Token(row.epoch, row.attempt - 1)), row.incarnation)
    with attempts.held(stale):
        with pytest.raises(LeaseLost, match="lost its lease"):
            app.submit_many(double, [(1,), (2,)])
        with pytest.raises(LeaseLost, match="lost its lease"):
            group([double.s(1), double.s(2)]).apply_async()
    assert rows(platform) == before
