"""Results: the places where they are kept, their contents, and the ways to wait for them.

The tests follow the sections of Celery's documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
from celery import chord, group, states
from celery.exceptions import InvalidTaskError, TaskRevokedError, TimeLimitExceeded
from celery.exceptions import TimeoutError as NotInTime
from celery.result import GroupResult

from celery_capacity.routing.config.embedded import Pair
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.tasks import add
from tests.fixtures.waiting import until
from tests.tasks import bodies, canvas, retrying

IMPORTS = ("tests.tasks.bodies", "tests.tasks.canvas", "tests.tasks.retrying")
REPLIES = "rpc://"


@pytest.fixture(scope="module", params=["redis", "postgres", "rpc"])
def platform(
    request: pytest.FixtureRequest, server_pair: Pair, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    """Yield one worker `a` with 2 CPUs and as many slots, that keeps extended results."""
    with standing_platform(server_pair, tmp_path_factory.mktemp(request.param), *IMPORTS) as running:
        database = running.engine.url.render_as_string(hide_password=False)
        running.environment["CELERY_RESULT_BACKEND"] = {
            "redis": str(running.settings.redis_url),
            "postgres": f"db+{database}",
            "rpc": REPLIES,
        }[request.param]
        running.worker("a", cpus=2, arguments=("result.extended=1",))
        yield running


@pytest.fixture
def waiter(platform: Platform, submitter: Submitter) -> Submitter:
    """Return a submitter that reads results where the worker keeps them."""
    submitter.app.conf.update(result_backend=platform.environment["CELERY_RESULT_BACKEND"], result_extended=True)
    return submitter


def is_rpc(waiter: Submitter) -> bool:
    return bool(waiter.app.conf.result_backend == REPLIES)


def test_a_waiting_job_is_waited_for(platform: Platform, waiter: Submitter) -> None:
    blocker = tasks.hold.apply_async(("block",), cpus=2)
    tasks.started(platform.redis, "block")
    waiting = add.apply_async((1, 2), cpus=2)
    waiter.until(waiting.id, "waiting")
    assert (waiting.state, waiting.ready()) == (states.PENDING, False)
    with pytest.raises(NotInTime):
        waiting.get(timeout=0.2)
    values: list[Any] = []
    reader = Thread(target=lambda: values.append(waiting.get(timeout=60)))
    if is_rpc(waiter):
        # A reply goes to the thread that asked.
        tasks.let_go(platform.redis, "block")
        values.append(waiting.get(timeout=60))
    else:
        reader.start()
        tasks.let_go(platform.redis, "block")
        reader.join(60)
    assert values == [3]
    assert (blocker.get(timeout=60), waiting.successful()) == ("a", True)


def test_each_end_has_its_result(platform: Platform, waiter: Submitter) -> None:
    # No worker reads yaml.
    waiter.app.conf.accept_content = ["json", "yaml"]
    unread = add.apply_async((1, 1), serializer="yaml")
    with pytest.raises(InvalidTaskError, match="yaml"):
        unread.get(timeout=60)
    failed = tasks.fail.delay("of itself")
    with pytest.raises(ValueError, match="of itself"):
        failed.get(timeout=60)
    assert "ValueError" in failed.traceback
    assert failed.get(propagate=False).args == ("of itself",)
    limited = tasks.hold.apply_async(("never",), time_limit=0.5)
    with pytest.raises(TimeLimitExceeded):
        limited.get(timeout=60)
    with pytest.raises(TypeError, match="argument"):
        waiter.app.send_task(add.name, (1, 2, 3)).get(timeout=60)
    assert retrying.with_others.delay(1).get(timeout=60) == 2
    # The revoked job ends without any worker, and a worker announces its end.
    later = add.apply_async((1, 1), countdown=600)
    waiter.until(later.id, "scheduled")
    later.revoke()
    with pytest.raises(TaskRevokedError):
        later.get(timeout=60)
    assert later.state == states.REVOKED


def test_states_on_the_way_are_told(platform: Platform, waiter: Submitter) -> None:
    result = bodies.progressing.delay("progress")
    tasks.started(platform.redis, "progress")
    assert until(lambda: result.state == "PROGRESS", "its state is told")
    assert result.info == {"done": 1, "of": 2}
    tasks.let_go(platform.redis, "progress")
    assert result.get(timeout=60) == "over"


def test_much_is_kept_of_a_result_where_it_is_asked_for(platform: Platform, waiter: Submitter) -> None:
    result = add.apply_async((1, 2), queue="celery")
    assert result.get(timeout=60) == 3
    until(lambda: result.date_done is not None, "it is kept")
    assert (result.name, result.worker.partition("@")[0], result.retries) == (add.name, "a", 0)
    assert (result.args, result.kwargs, result.queue) == ([1, 2], {}, "celery")


def test_many_results_are_read_as_they_come_and_together(platform: Platform, waiter: Submitter) -> None:
    results = group(add.s(number, 1) for number in range(6)).apply_async()
    assert results.join(timeout=60) == [1, 2, 3, 4, 5, 6]
    assert results.successful() and results.completed_count() == 6
    if waiter.app.backend.supports_native_join:
        native = group(add.s(number, 2) for number in range(6)).apply_async()
        assert sorted(meta["result"] for _, meta in native.iter_native(timeout=60)) == [2, 3, 4, 5, 6, 7]
        assert group(add.s(1, 1), add.s(2, 2)).apply_async().join_native(timeout=60) == [2, 4]
    seen: list[tuple[str, int]] = []
    several = group(add.s(1, 1), add.s(2, 2)).apply_async()
    several.get(timeout=60, callback=lambda job, value: seen.append((job, value)))
    # Results come in any order.
    assert sorted(seen, key=lambda pair: pair[1]) == [(several.results[0].id, 2), (several.results[1].id, 4)]
    mixed = group(add.s(1, 1), tasks.fail.s("one of them")).apply_async()
    with pytest.raises(ValueError, match="one of them"):
        mixed.get(timeout=60)
    assert mixed.results[0].get(timeout=60) == 2
    steps = (add.s(1, 1) | add.s(1) | add.s(1)).apply_async()
    assert steps.get(timeout=60) == 4
    many = waiter.app.submit_many(add, [(number, 0) for number in range(3)])
    assert [many[number].get(timeout=60) for number in range(3)] == [0, 1, 2]


def test_what_is_kept_can_be_found_again_and_forgotten(platform: Platform, waiter: Submitter) -> None:
    results = group(add.s(1, 1), add.s(2, 2)).apply_async()
    joined = chord([add.s(1, 1), add.s(2, 2)], canvas.total.s())
    if is_rpc(waiter):
        # No backend keeps the group's results, and Celery says so.
        with pytest.raises(NotImplementedError):
            results.save()
        with pytest.raises(NotImplementedError, match="chord"):
            joined.apply_async()
        assert results.get(timeout=60) == [2, 4]
        return
    results.save()
    restored = GroupResult.restore(results.id, app=waiter.app)
    assert restored is not None
    assert restored.get(timeout=60) == [2, 4]
    assert joined.apply_async().get(timeout=60) == 6
    (first, _) = results.results
    first.forget()
    assert waiter.result(first.id).state == states.PENDING
    results.delete()
    assert GroupResult.restore(results.id, app=waiter.app) is None


def test_a_task_that_waits_for_another_must_say_so(platform: Platform, waiter: Submitter) -> None:
    assert bodies.waiting_for_another.delay(1, True).get(timeout=60) == 2
    with pytest.raises(RuntimeError, match="Never call result"):
        bodies.waiting_for_another.delay(1, False).get(timeout=60)


def test_a_program_that_waits_for_nothing_is_told_nothing(platform: Platform, waiter: Submitter) -> None:
    waiter.app.conf.result_backend = "disabled://"
    waiter.app._backend_cache = None
    waiter.app._local.backend = None
    job = waiter.send(add.name, 1, 1)
    assert waiter.ended(job).state == "succeeded"
    with pytest.raises(NotImplementedError, match="No result backend"):
        waiter.result(job).get(timeout=1)


def test_an_errback_finds_the_result_of_the_job_that_failed(platform: Platform, waiter: Submitter) -> None:
    if is_rpc(waiter):
        pytest.skip("a reply is no stored result")
    for _ in range(3):
        errback = bodies.state_of.s()
        errback.freeze()
        failed = bodies.throwing.apply_async((True,), link_error=errback)
        assert waiter.app.AsyncResult(errback.id).get(timeout=60) == states.FAILURE
        assert failed.state == states.FAILURE


def channels(platform: Platform, job: str) -> list[Any]:
    return list(platform.redis.execute_command("PUBSUB", "CHANNELS", f"*{job}"))  # type: ignore[no-untyped-call]


def test_get_and_forget_end_the_subscription_of_a_result(platform: Platform, waiter: Submitter) -> None:
    if "redis" not in waiter.app.conf.result_backend:
        pytest.skip("only Redis has channels")
    held = tasks.hold.delay("subscribed")
    waiting = Thread(target=held.get, kwargs={"timeout": 20})
    waiting.start()
    until(lambda: channels(platform, held.id), "the result is waited for")
    tasks.let_go(platform.redis, "subscribed")
    waiting.join()
    until(lambda: not channels(platform, held.id), "nobody waits any more")
    left = tasks.hold.delay("left")
    with pytest.raises(NotInTime):
        left.get(timeout=0.2)
    left.forget()
    until(lambda: not channels(platform, left.id), "nobody waits any more")
    tasks.let_go(platform.redis, "left")
    waiter.ended(left.id)
