"""Tasks: the messages of a body, its possible ends, and the records of them.

The tests follow the sections of Celery's documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from celery import group, states
from celery.exceptions import InvalidTaskError, Reject, SoftTimeLimitExceeded

from celery_capacity import InvalidRequest
from celery_capacity.routing.config.embedded import Pair
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform, Pool
from tests.fixtures.tasks import add
from tests.fixtures.waiting import until
from tests.tasks import bodies


@pytest.fixture(scope="module", params=["prefork", "threads"])
def pool(request: pytest.FixtureRequest) -> Pool:
    pool_name: Pool = request.param
    return pool_name


@pytest.fixture(scope="module")
def platform(pool: Pool, server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield one worker `a` with 2 CPUs and as many slots."""
    with standing_platform(server_pair, tmp_path_factory.mktemp(pool), "tests.tasks.bodies") as running:
        running.worker("a", cpus=2, pool=pool)
        yield running


def test_a_message_carries_headers_and_a_shadow_to_the_body(platform: Platform, submitter: Submitter) -> None:
    result = bodies.seen.apply_async(
        headers={"tenant": "blue"}, shadow="a name for people", time_limit=60, soft_time_limit=50, cpus=0.5
    )
    assert result.get(timeout=60) == {
        "id": result.id,
        "tenant": "blue",
        "in headers": "blue",
        "shadow": "a name for people",
        "timelimit": [60, 50],
        "root_id": result.id,
        "ignore_result": False,
        "eager": False,
        "called": False,
    }
    # People read the shadow name in the log. The job keeps the name of its task.
    platform.processes[0].wait_for(f"Task a name for people[{result.id}] succeeded")
    assert submitter.ended(result.id).name == bodies.seen.name
    assert bodies.shadowed.delay(7).get(timeout=60) == "adding 7"


def test_the_body_sees_the_properties_of_its_message(submitter: Submitter) -> None:
    properties = {"app_id": "shop", "message_id": "m-1", "type": "order", "user_id": "ann", "color": ["red", 1]}
    single = bodies.properties.apply_async(**properties, expiration=60)
    (of_group,) = group([bodies.properties.s().set(app_id="shop")]).apply_async()
    (of_chunk,) = submitter.app.submit_many(bodies.properties, [()], **properties)
    for result in (single, of_chunk):
        assert properties.items() <= result.get(timeout=60).items()
    assert (single.get()["expiration"], single.get()["correlation_id"]) == ("60000", single.id)
    assert of_group.get(timeout=60)["app_id"] == "shop"
    when = datetime.now(UTC)
    assert bodies.properties.apply_async(timestamp=when).get(timeout=60)["timestamp"] == when


def test_a_property_that_is_not_json_is_refused(submitter: Submitter) -> None:
    before = submitter.jobs()
    with pytest.raises(InvalidRequest, match="the property app_id of the message"):
        bodies.properties.apply_async(app_id=object())
    assert submitter.jobs() == before


def test_a_task_that_was_put_off_sees_to_when(submitter: Submitter) -> None:
    when = datetime.now(UTC) + timedelta(seconds=0.3)
    named = bodies.due.apply_async(eta=when)
    counted = bodies.due.apply_async(countdown=0.2)
    again = bodies.due.apply_async((True,), eta=when)
    assert named.get(timeout=60) == when.isoformat()
    assert datetime.fromisoformat(counted.get(timeout=60)) == submitter.ended(counted.id).due_at
    assert again.get(timeout=60) is None
    assert bodies.due.delay().get(timeout=60) is None


def test_limits_of_the_task_are_those_of_its_calls_that_name_none(
    platform: Platform, submitter: Submitter, pool: Pool
) -> None:
    assert bodies.limits.delay().get(timeout=60) == [50, 40]
    assert bodies.limits.apply_async(time_limit=30, soft_time_limit=20).get(timeout=60) == [30, 20]
    if pool == "threads":
        # No pool but prefork can interrupt a body.
        return
    assert bodies.cleaning_up.delay("never").get(timeout=60) == "cleaned up"
    caught = bodies.tracked.apply_async(("never",), soft_time_limit=0.5)
    with pytest.raises(SoftTimeLimitExceeded):
        caught.get(timeout=60)
    assert submitter.ended(caught.id).state == "failed"


def test_started_is_a_state_where_the_task_asks_for_it(platform: Platform, submitter: Submitter) -> None:
    result = bodies.tracked.delay("tracked")
    _, pid = tasks.started(platform.redis, "tracked")
    assert result.state == states.STARTED
    assert (result.info["pid"], result.info["hostname"].partition("@")[0]) == (pid, "a")
    plain = tasks.hold.delay("plain")
    tasks.started(platform.redis, "plain")
    assert plain.state == states.PENDING
    for gate in ("tracked", "plain"):
        tasks.let_go(platform.redis, gate)
    assert (result.get(timeout=60), plain.get(timeout=60)) == ("over", "a")


def test_states_of_ones_own_are_seen_while_the_body_runs(platform: Platform, submitter: Submitter) -> None:
    result = bodies.progressing.delay("progress")
    tasks.started(platform.redis, "progress")
    assert (result.state, result.info) == ("PROGRESS", {"done": 1, "of": 2})
    tasks.let_go(platform.redis, "progress")
    assert (result.get(timeout=60), result.state) == ("over", states.SUCCESS)
    # A state that was stored before Ignore stays, and no result follows it.
    left = bodies.stopping_half_way.delay()
    assert submitter.ended(left.id).state == "succeeded"
    assert (left.state, left.info) == ("HALF", {"done": 1})


def test_a_task_that_rejects_its_message_has_failed(platform: Platform, submitter: Submitter) -> None:
    result = bodies.rejecting.delay()
    row = submitter.ended(result.id)
    assert (row.state, row.error) == ("failed", "rejected: not mine")
    with pytest.raises(Reject):
        result.get(timeout=60)
    assert result.state == states.FAILURE


def test_a_message_that_a_task_puts_back_is_redelivered(platform: Platform, submitter: Submitter) -> None:
    result = bodies.rejecting_until_redelivered.delay()
    assert result.get(timeout=60) == [2, True]
    assert submitter.ended(result.id).state == "succeeded"
    assert submitter.outcomes(result.id) == ["requeued", "succeeded"]
    assert [attempt.error for attempt in submitter.attempts(result.id)] == ["rejected: not now", None]
    assert bodies.redelivered.delay().get(timeout=60) == [False, False]


def test_a_task_that_always_puts_its_message_back_starves_nobody(platform: Platform, submitter: Submitter) -> None:
    hopeless = bodies.rejecting_for_ever.apply_async(cpus=2, priority=9)
    until(lambda: len(submitter.attempts(hopeless.id)) > 2, "it was put back")
    assert add.apply_async((1, 1), cpus=2).get(timeout=60) == 2
    row = submitter.until(hopeless.id, "scheduled")
    last = submitter.attempts(hopeless.id)[row.attempt - 1]
    # The third pause is of two seconds.
    assert (row.due_at - last.ended_at).total_seconds() > 1.5
    hopeless.revoke()
    assert submitter.ended(hopeless.id).state == "cancelled"


def test_errors_that_a_task_may_raise_are_no_alarm(platform: Platform, submitter: Submitter) -> None:
    worker = platform.processes[0]
    results = {is_expected: bodies.throwing.delay(is_expected) for is_expected in (True, False)}
    for is_expected, result in results.items():
        with pytest.raises(bodies.Expected if is_expected else ValueError, match="as said"):
            result.get(timeout=60)
        assert submitter.ended(result.id).state == "failed"
    expected, other = (worker.wait_for(f"{result.id}] raised") for result in results.values())
    assert "INFO" in expected and "raised expected: " in expected
    assert "ERROR" in other and "raised unexpected: " in other


def test_results_that_nobody_wants_are_not_kept(platform: Platform, submitter: Submitter) -> None:
    # No worker reads yaml.
    submitter.app.conf.accept_content = ["json", "yaml"]
    wanted = bodies.silent.apply_async((1,), ignore_result=False)
    unread = bodies.silent.apply_async((1,), ignore_result=False, serializer="yaml")
    ignored = [
        bodies.silent.delay(1),
        add.apply_async((1, 1), ignore_result=True),
        bodies.silent_failure.delay(),
        bodies.silent.apply_async((1,), serializer="yaml"),
        add.apply_async((1, 1), serializer="yaml", ignore_result=True),
    ]
    assert wanted.get(timeout=60) == 1
    with pytest.raises(InvalidTaskError, match="yaml"):
        unread.get(timeout=60)
    ended = [submitter.ended(result.id).state for result in ignored]
    assert ended == ["succeeded", "succeeded", "failed", "failed", "failed"]
    assert [(result.get(timeout=1), result.state) for result in ignored] == [(None, states.PENDING)] * 5
    heard = bodies.heard_failure.delay()
    assert submitter.ended(heard.id).state == "failed"
    until(lambda: submitter.result(heard.id).state == states.FAILURE, "the error is kept")
    with pytest.raises(ValueError, match="heard of"):
        submitter.result(heard.id).get(timeout=60)


def test_what_ends_without_a_worker_is_kept_where_it_is_wanted(platform: Platform, submitter: Submitter) -> None:
    full = tasks.hold.apply_async(("full",), cpus=2)
    tasks.started(platform.redis, "full")
    wanted = add.apply_async((1, 1), cpus=2, expires=0.3)
    silent = bodies.silent.apply_async((1,), cpus=2, expires=0.3)
    heard = bodies.heard_failure.apply_async((), cpus=2, expires=0.3)
    assert [submitter.ended(result.id).state for result in (wanted, silent, heard)] == ["expired"] * 3
    tasks.let_go(platform.redis, "full")
    assert full.get(timeout=60) == "a"
    for kept in (wanted, heard):
        until(lambda kept=kept: submitter.result(kept.id).state == states.REVOKED, "it is kept")  # type: ignore[misc]
    until(lambda: submitter.row(silent.id).outbox is None, "nothing is left to be told of it")
    assert submitter.result(silent.id).state == states.PENDING


def test_a_result_knows_what_its_task_sent(platform: Platform, submitter: Submitter) -> None:
    leading = bodies.leading.delay()
    sent = leading.get(timeout=60)
    assert [child.id for child in leading.children] == sent
    assert [value for _, value in leading.collect(timeout=60)] == [sent, 2, 4]
    nobody = bodies.leading_nobody.delay()
    (alone,) = nobody.get(timeout=60)
    assert not nobody.children
    assert submitter.value(alone) == 2


def test_called_in_this_process_a_task_makes_no_job(platform: Platform, submitter: Submitter) -> None:
    # A task reads this setting when its app is made.
    submitter.app.conf.task_store_eager_result = True
    before = submitter.jobs()
    applied = bodies.seen.apply(headers={"tenant": "blue"}, cpus=100, task_id="mine")
    assert (applied.state, applied.get()["eager"], applied.id) == (states.SUCCESS, True, "mine")
    assert bodies.seen()["called"] is True
    submitter.app.conf.task_always_eager = True
    assert add.apply_async((1, 2), cpus=100, priority=9, queue="elsewhere").get() == 3
    failed = bodies.throwing.delay(True)
    assert (failed.state, type(failed.result)) == (states.FAILURE, bodies.Expected)
    submitter.app.conf.task_eager_propagates = True
    with pytest.raises(bodies.Expected):
        bodies.throwing.delay(True)
    submitter.app.conf.task_eager_propagates = False
    kept = add.delay(3, 4)
    assert submitter.result(kept.id).get(timeout=60) == 7
    assert submitter.jobs() == before
