"""Canvas: designing workflows. A waiting job holds nothing.

Each canvas runs with Celery's own results, on one worker with one CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.canvas import Signature, StampingVisitor, chunks, xmap, xstarmap
from celery.exceptions import ChordError
from sqlalchemy import text

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.model.states import FINAL
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Pool
from tests.fixtures.tasks import add
from tests.fixtures.waiting import until
from tests.tasks.canvas import (
    adding_to_its_chord,
    becomes,
    becomes_chunks,
    carried,
    failing,
    gated,
    listed,
    told,
    total,
    waiting,
)

#: Seconds for a canvas of some dozen jobs, each of which waits for the only CPU.
WITHIN = 120.0


@pytest.fixture(scope="module", params=["prefork, native joins", "threads, unlock joins"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def native(kind: str) -> bool:
    """Return True if the result backend joins chords itself (Redis), False if a polling task does (SQLAlchemy)."""
    return "native" in kind


@pytest.fixture(scope="module")
def platform(
    kind: str, native: bool, server_pair: Pair, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    folder: Path = tmp_path_factory.mktemp("canvas")
    pool: Pool = "prefork" if "prefork" in kind else "threads"
    with standing_platform(server_pair, folder, "tests.tasks.canvas") as running:
        if not native:
            running.environment["CELERY_RESULT_BACKEND"] = f"db+{running.settings.database_url}"
        running.worker("a", cpus=1, pool=pool)
        yield running


@pytest.fixture
def submitter(submitter: Submitter, platform: Platform) -> Submitter:
    backend = platform.environment.get("CELERY_RESULT_BACKEND")
    if backend:
        submitter.app.conf.result_backend = backend
    return submitter


def awaited(sent: dict[str, Any]) -> dict[str, Any]:
    """Return the value of each result, or its exception, so that a failure hides no other result."""
    return {name: result.get(timeout=WITHIN, propagate=False) for name, result in sent.items()}


def at_rest(platform: Platform) -> None:
    """Wait until every job of the test has ended."""

    def unfinished() -> list[Any]:
        with platform.engine.connect() as connection:
            job_rows = connection.execute(text("SELECT id, name, state, error FROM jobs"))
            return [row for row in job_rows if row.state not in FINAL]

    until(lambda: not unfinished(), lambda: f"all jobs have ended; these have not: {unfinished()}", WITHIN)


#: Name -> (function that makes the canvas, value that it returns).
CANVAS: dict[str, tuple[Callable[[], Signature], Any]] = {
    "chain": (lambda: add.s(1, 1) | add.s(10) | add.s(100), 112),
    "group": (lambda: group(add.s(i, i) for i in range(5)), [0, 2, 4, 6, 8]),
    "chord": (lambda: chord([add.s(i, i) for i in range(5)], total.s()), 20),
    "group of chains": (lambda: group(add.s(i, 1) | add.s(10) for i in range(3)), [11, 12, 13]),
    "chain that begins with a group": (lambda: group(add.s(1, 1), add.s(2, 2)) | total.s() | add.s(1), 7),
    "chain that ends with a group": (lambda: add.s(1, 1) | group(add.s(10), add.s(100)), [12, 102]),
    "chords in a row": (
        lambda: add.s(0, 1) | group(add.s(1), add.s(2)) | total.s() | group(add.s(10), add.s(20)) | total.s(),
        40,
    ),
    "chord of chords": (
        lambda: chord([chord([add.s(i, 1), add.s(i, 2)], total.s()) for i in range(3)], total.s()),
        15,
    ),
    "chord with a chain as body": (lambda: chord([add.s(1, 1), add.s(2, 2)], total.s() | add.s(100)), 106),
    "chord with a chord as body": (
        lambda: chord([add.s(1, 1), add.s(2, 2)], chord([total.s(), total.s()], total.s())),
        12,
    ),
    "chord with chains as header": (lambda: chord([add.s(1, 1) | add.s(5), add.s(1, 1)], total.s()), 9),
    "group of groups": (lambda: group(group(add.s(1, 1), add.s(2, 2)), add.s(3, 3)), [2, 4, 6]),
    "map": (lambda: xmap(total.s(), [[1, 2], [3, 4]]), [3, 7]),
    "starmap": (lambda: xstarmap(add.s(), [(1, 2), (3, 4)]), [3, 7]),
    "chunks": (lambda: chunks(add.s(), [(i, i) for i in range(5)], 2), [[0, 2], [4, 6], [8]]),
    "map in a chain": (lambda: xmap(total.s(), [[1, 2], [3, 4]]) | total.s(), 10),
    "immutable signatures": (lambda: add.s(1, 1) | add.si(5, 5) | add.s(1), 11),
    "an empty header": (lambda: chord([], total.s()), 0),
}


def test_every_canvas_returns_what_it_does_in_celery(platform: Platform, submitter: Submitter) -> None:
    sent = {name: make().apply_async() for name, (make, _) in CANVAS.items()}
    assert awaited(sent) == {name: value for name, (_, value) in CANVAS.items()}
    at_rest(platform)


#: Name -> (canvas that replaces a task, arguments of the task, value that its id returns then).
REPLACED: dict[str, tuple[Callable[[], Signature], tuple[int, ...], Any]] = {
    "task": (lambda: add.s(100), (1,), 101),
    "chain": (lambda: add.s(100) | add.s(10) | add.s(1), (1,), 112),
    "group": (lambda: group(add.s(1, 1), add.s(2, 2)), (), [2, 4]),
    "chord": (lambda: chord([add.s(1, 1), add.s(2, 2)], total.s()), (), 6),
    "chain that ends with a group": (lambda: add.s(1) | group(add.s(10), add.s(20)), (1,), [12, 22]),
    "chain with a chord inside": (lambda: add.s(1) | group(add.s(1), add.s(2)) | total.s() | add.s(100), (1,), 107),
    "chord with a chain as body": (lambda: chord([add.s(1, 1), add.s(2, 2)], total.s() | add.s(10)), (), 16),
    "chord with headers of its own": (
        lambda: chord([add.s(1, 1), add.s(2, 2)], total.s() | add.s(10)).set(headers={"tenant": "blue"}),
        (),
        16,
    ),
    "group of chords": (lambda: group(chord([add.s(i, 1), add.s(i, 2)], total.s()) for i in range(2)), (), [3, 5]),
    "starmap": (lambda: xstarmap(add.s(), [(1, 2), (3, 4)]), (), [3, 7]),
    "chain whose first step is replaced": (lambda: becomes.s(canvas=add.s(10) | add.s(1)) | add.s(100), (1,), 112),
    "chain whose last step is replaced": (lambda: add.s(100) | becomes.s(canvas=add.s(10) | add.s(1)), (1,), 112),
    "chord whose body begins with a step that is replaced": (
        lambda: becomes.s(
            canvas=chord([add.s(1, 1), add.s(2, 2)], becomes.s(canvas=total.s() | add.s(1)) | add.s(10) | add.s(100)),
        ),
        (),
        117,
    ),
    "replaced again and again": (
        lambda: becomes.s(canvas=add.s(1) | becomes.s(canvas=add.s(1) | add.s(1))),
        (1,),
        4,
    ),
}


def test_a_task_is_replaced_by_whatever_canvas_under_its_id(platform: Platform, submitter: Submitter) -> None:
    sent = {name: becomes.apply_async(args, {"canvas": make()}) for name, (make, args, _) in REPLACED.items()}
    sent["chunks"] = becomes_chunks.delay()
    # Each replacement also happens in a step of a chain, in a part of a chord, and in a chord's body.
    for name in ("task", "chain", "group", "chord"):
        make, args, _ = REPLACED[name]
        sent[f"{name} in a chain"] = (becomes.s(*args, canvas=make()) | listed.s()).apply_async()
        sent[f"{name} in a chord"] = chord([becomes.s(*args, canvas=make()), add.s(1, 1)], listed.s()).apply_async()
    sent["body"] = chord([add.s(1, 1), add.s(2, 2)], becomes.s(canvas=total.s() | add.s(1))).apply_async()
    expected = {name: value for name, (_, _, value) in REPLACED.items()}
    for name in ("task", "chain", "group", "chord"):
        expected[f"{name} in a chain"] = [expected[name]]
        expected[f"{name} in a chord"] = [[expected[name], 2]]
    expected |= {"body": 7, "chunks": [[3, 7], [11]]}
    assert awaited(sent) == expected
    at_rest(platform)
    for name in REPLACED:
        row = submitter.row(sent[name].id)
        assert (row.state, row.retries) == ("succeeded", 0)
        *before, last = submitter.outcomes(row.id)
        assert (set(before), last) == ({"replaced"}, "succeeded")


#: Options of each signature.
GIVEN: dict[str, Any] = {"cpus": 0.5, "memory": "1MiB", "priority": 7, "headers": {"tenant": "blue"}}


def bare(case: str, immutable: bool = False) -> Signature:
    return carried.signature((), {"case": case}, immutable=immutable)


def one(case: str, immutable: bool = False) -> Signature:
    return bare(case, immutable).set(**GIVEN)


#: Name -> (canvas of the carried signature, number of its runs in the canvas).
SURVIVED: dict[str, tuple[Callable[[str], Signature], int]] = {
    "chain": (lambda case: one(case) | one(case) | one(case), 3),
    "group": (lambda case: group(one(case), one(case)), 2),
    "chord": (lambda case: chord([one(case), one(case)], one(case)), 3),
    "nested": (lambda case: one(case) | group(one(case) | one(case), one(case)) | one(case), 5),
    "given to a group": (lambda case: group(bare(case), bare(case)).set(**GIVEN), 2),
    "given to a chord": (lambda case: chord([bare(case), bare(case)], bare(case)).set(**GIVEN), 3),
    "link": (lambda case: add.s(1, 1).set(link=one(case)), 1),
    "link_error": (lambda case: failing.s().set(link_error=one(case)), 1),
    "chord error": (lambda case: chord([failing.s(), add.s(1, 1)], total.s().on_error(one(case))), 1),
    "immutable": (lambda case: add.s(1, 1) | one(case, immutable=True), 1),
    "replaced by a task": (lambda case: becomes.s(canvas=one(case)), 1),
    "replaced by a chain": (lambda case: becomes.s(canvas=one(case) | one(case) | one(case)), 3),
    "replaced by a chord": (lambda case: becomes.s(canvas=chord([one(case), one(case)], one(case))), 3),
    "replaced by what it is given to": (
        lambda case: becomes.s(canvas=chord([bare(case), bare(case)], bare(case)).set(**GIVEN)),
        3,
    ),
    "replaced in a chain": (lambda case: becomes.s(canvas=add.s(1, 1)) | one(case), 1),
}


def test_what_a_signature_is_given_survives_every_canvas(platform: Platform, submitter: Submitter) -> None:
    for case, (make, _) in SURVIVED.items():
        make(case).apply_async()
    for case, (_, count) in SURVIVED.items():
        until(lambda case=case, count=count: platform.redis.llen(case) == count, f"{case} ran", WITHIN)  # type: ignore[misc]
        entries: Any = platform.redis.lrange(case, 0, -1)
        assert (case, {entry.decode() for entry in entries}) == (case, {"blue 7"})
    at_rest(platform)
    with platform.engine.connect() as connection:
        query = text("SELECT request, priority FROM jobs WHERE name = :name")
        entries = list(connection.execute(query, {"name": carried.name}))
    assert len(entries) == sum(count for _, count in SURVIVED.values())
    assert all(row.request == {"cpus": 0.5, "memory": 2**20, "slots": 1} and row.priority == 7 for row in entries)


def test_tasks_of_celerys_own_ask_for_what_they_need(platform: Platform, submitter: Submitter) -> None:
    """A map and a starmap run their task within their own job; a task that only combines others takes a slot alone."""
    sent = {
        "declared": xmap(total.s(), [[1, 2]]).apply_async(),
        "given": xstarmap(add.s().set(cpus=0.25), [(1, 2)]).apply_async(),
        "its own": xstarmap(add.s().set(cpus=0.25), [(1, 2)]).set(cpus=0.75).apply_async(),
        "default": add.map([]).apply_async(),
        "chunks": add.chunks([(1, 2)], 1).set(cpus=0.125, priority=3).apply_async().results[0],
        "replaced": becomes.s(canvas=group(add.s(1, 1), add.s(2, 2))).apply_async(),
    }
    awaited(sent)
    asked = {name: submitter.row(result.id).request for name, result in sent.items()}
    assert asked == {
        "declared": {"cpus": 0.5, "slots": 1},
        "given": {"cpus": 0.25, "slots": 1},
        "its own": {"cpus": 0.75, "slots": 1},
        "default": {"cpus": 1, "slots": 1},
        "chunks": {"cpus": 0.125, "slots": 1},
        "replaced": {"cpus": 0, "slots": 1},
    }
    with platform.engine.connect() as connection:
        unlocks = list(connection.execute(text("SELECT request FROM jobs WHERE name = 'celery.chord_unlock'")))
    assert all(row.request == {"cpus": 0, "slots": 1} for row in unlocks)
    at_rest(platform)


def test_a_chord_larger_than_the_cluster_waits_without_holding_anything(
    platform: Platform, submitter: Submitter
) -> None:
    """Each level waits for the one below, on one CPU: were anything held meanwhile, nothing would ever run."""

    def level(depth: int) -> Signature:
        return chord([level(depth - 1) if depth else add.s(1, 1) for _ in range(3)], total.s())

    held = chord([gated.s(1, gate="held"), *(add.s(1, 1) for _ in range(5))], listed.s()).apply_async()
    tasks.started(platform.redis, "held")
    results = [level(1).apply_async() for _ in range(3)] + [becomes.s(canvas=level(1)).apply_async()]
    # The running job has its request, and the waiting jobs hold nothing.
    assert submitter.allocated_cpus() == "1"
    tasks.let_go(platform.redis, "held")
    assert held.get(timeout=WITHIN) == [[[1], 2, 2, 2, 2, 2]]
    assert [result.get(timeout=WITHIN) for result in results] == [18] * 4
    at_rest(platform)
    assert submitter.allocated_cpus() == "0"


def test_the_body_of_a_chord_and_its_callbacks_hear_of_a_part_that_failed(
    platform: Platform, submitter: Submitter, native: bool
) -> None:
    body = total.s().on_error(told.s(case="errback"))
    body.link(told.s(case="callback"))
    sent = {
        "chord": chord([add.s(1, 1), failing.s()], body).apply_async(),
        "nested": chord([chord([failing.s(), add.s(1, 1)], total.s()), add.s(1, 1)], total.s()).apply_async(),
        "chain": (add.s(1, 1) | failing.s() | add.s(1)).apply_async(),
        "chord in a chain": (group(add.s(1, 1), failing.s()) | total.s() | add.s(1)).apply_async(),
    }
    for name, result in sent.items():
        with pytest.raises((ChordError, ValueError), match="the step failed"):
            pytest.fail(f"{name} returned {result.get(timeout=WITHIN)}")
    until(lambda: platform.redis.llen("errback") == 1, "the errback was called", WITHIN)
    at_rest(platform)
    assert platform.redis.llen("callback") == 0
    assert submitter.row(sent["chord"].id) is None


def test_the_body_of_a_chord_is_a_child_of_the_part_that_completed_it(submitter: Submitter, native: bool) -> None:
    if not native:
        # The task that joins is the parent there.
        return
    parts, first = [add.s(n, n) for n in range(3)], add.s(0, 0)
    alone = chord(parts, total.s())()
    within = (first | group(add.s(n) for n in range(3)) | total.s() | listed.s()).apply_async()
    assert (alone.get(timeout=WITHIN), within.get(timeout=WITHIN)) == (6, [3])
    body = submitter.row(alone.id)
    assert body.parent_id == body.root_id
    assert body.parent_id in [part.id for part in alone.parent.results]
    last, joined = submitter.row(within.id), submitter.row(within.parent.id)
    header = within.parent.parent
    assert (last.parent_id, joined.parent_id in [part.id for part in header.results]) == (within.parent.id, True)
    assert {last.root_id, joined.root_id} == {header.parent.id}


def test_an_error_callback_that_takes_long_keeps_back_its_own_chord_alone(
    platform: Platform, submitter: Submitter, native: bool
) -> None:
    if not native:
        # A job joins the results there, so a long errback has a slot of its own.
        return
    late = [chord([failing.s()], total.s().on_error(waiting.s(gate="errback"))).apply_async() for _ in range(3)]
    for _ in late:
        # All errbacks wait at once, and each for longer than the calls below take.
        tasks.started(platform.redis, "errback")
    assert add.apply_async((1, 1), countdown=0.5).get(timeout=WITHIN) == 2
    assert chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async().get(timeout=WITHIN) == 6
    tasks.let_go(platform.redis, "errback", len(late))
    for result in late:
        with pytest.raises((ChordError, ValueError), match="the step failed"):
            pytest.fail(f"the chord returned {result.get(timeout=WITHIN)}")
    at_rest(platform)

    def undelivered() -> list[Any]:
        with platform.engine.connect() as connection:
            return list(connection.execute(text("SELECT id, outbox FROM jobs WHERE outbox IS NOT NULL")))

    until(lambda: not undelivered(), lambda: f"nothing is left: {undelivered()}", WITHIN)
    # Each errback was called once, though the rows named it as undelivered for a while.
    assert platform.redis.llen("errback:started") == 0


def test_links_are_called_with_what_their_task_returned(platform: Platform, submitter: Submitter) -> None:
    result = add.apply_async((1, 1), link=[told.s(case="linked"), add.s(5) | told.s(case="linked")])
    assert result.get(timeout=WITHIN) == 2
    until(lambda: platform.redis.llen("linked") == 2, "both links ran", WITHIN)
    failing.apply_async(link=told.s(case="linked"), link_error=told.s(case="failed"))
    until(lambda: platform.redis.llen("failed") == 1, "the errback ran", WITHIN)
    at_rest(platform)
    assert platform.redis.llen("linked") == 2


def test_a_part_adds_another_one_to_its_chord(platform: Platform, submitter: Submitter, native: bool) -> None:
    if not native:
        # Celery supports this with Redis alone.
        with pytest.raises(NotImplementedError):
            submitter.app.backend.add_to_chord("group", submitter.result("job"))
        return
    body = chord([adding_to_its_chord.s(1, add.s(2, 2)), add.s(3, 3)], total.s()).apply_async()
    assert body.get(timeout=WITHIN) == 11
    replaced = becomes.s(canvas=chord([adding_to_its_chord.s(1, add.s(2, 2)), add.s(3, 3)], total.s())).apply_async()
    assert replaced.get(timeout=WITHIN) == 11
    at_rest(platform)


class Stamps(StampingVisitor):
    """Stamp each signature with a label."""

    def on_signature(self, sig: Signature, **headers: Any) -> dict[str, Any]:
        return {"label": "green"}


def test_stamps_reach_every_job_of_a_canvas(platform: Platform, submitter: Submitter) -> None:
    canvas = chain(add.s(1, 1), group(add.s(1), add.s(2)), total.s())
    canvas.stamp(Stamps())
    result = canvas.apply_async()
    assert result.get(timeout=WITHIN) == 7
    at_rest(platform)
    with platform.engine.connect() as connection:
        rows = connection.execute(text("SELECT name, convert_from(message, 'UTF8') FROM jobs ORDER BY seq DESC"))
        stamped = [name.rpartition(".")[2] for name, message in rows if '"label":' in message and "green" in message]
    assert sorted(stamped) == ["add", "add", "add", "total"]
