"""A job with `requests=` runs by the first alternative that a worker has room for, and shows that one."""

from __future__ import annotations

import json

import pytest

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.inspect.explain import explain
from celery_capacity.routing.model.reasons import Reason
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.tasks.choosing import becomes, reports

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"
GPU_OR_CPUS = [{"gpus": 1}, {"cpus": 3}]
GPU, WIDE = {"cpus": 1, "gpus": 1, "slots": 1}, {"cpus": 3, "slots": 1}


def _request(platform: Platform, job: str) -> dict[str, int]:
    request: dict[str, int] = json.loads(platform.celery("job", job, "--json").stdout)["request"]
    return request


def test_job_runs_by_the_first_alternative_with_room(platform: Platform, submitter: Submitter) -> None:
    platform.worker("x", cpus=4, pool="threads", PLATFORM_GPUS="1")
    first = submitter.send(HOLD, "first", requests=GPU_OR_CPUS)
    tasks.started(platform.redis, "first")
    second = submitter.send(HOLD, "second", requests=GPU_OR_CPUS)
    tasks.started(platform.redis, "second")
    third = submitter.send(ADD, 1, 2, requests=GPU_OR_CPUS)
    submitter.until(third, "waiting")
    assert _request(platform, first) == {"cpus": 1, "gpus": 1, "slots": 1}
    assert _request(platform, second) == {"cpus": 3, "slots": 1}
    tasks.let_go(platform.redis, "second")
    assert submitter.ended(third).state == "succeeded"
    assert _request(platform, third) == {"cpus": 3, "slots": 1}
    tasks.let_go(platform.redis, "first")
    assert [submitter.ended(job).state for job in (first, second)] == ["succeeded"] * 2


def test_command_submits_alternatives(platform: Platform, submitter: Submitter) -> None:
    platform.worker("x", cpus=4, pool="threads")
    command = platform.celery("submit", ADD, "--args", "[1, 2]", "--requests", json.dumps(GPU_OR_CPUS), "--json")
    job = json.loads(command.stdout)["id"]
    assert submitter.ended(job).state == "succeeded"
    assert _request(platform, job) == {"cpus": 3, "slots": 1}


def test_job_is_infeasible_only_if_no_alternative_fits(platform: Platform, submitter: Submitter) -> None:
    platform.worker("x", cpus=2, pool="threads")
    never = submitter.send(ADD, 1, 2, requests=[{"gpus": 1}, {"cpus": 9}])
    held = submitter.send(HOLD, "held", cpus=1)
    tasks.started(platform.redis, "held")
    waits = submitter.send(ADD, 1, 2, requests=[{"gpus": 1}, {"cpus": 2}])
    with platform.engine.connect() as connection:
        blocked, waiting = explain(platform.redis, connection, never), explain(platform.redis, connection, waits)
    assert blocked is not None and blocked.why is Reason.UNKNOWN_RESOURCE
    assert waiting is not None and waiting.why is Reason.NO_ROOM
    assert [(room.resource, room.enough) for room in waiting.missing[0].rooms] == [("cpus", False), ("slots", True)]
    tasks.let_go(platform.redis, "held")
    assert submitter.ended(waits).state == "succeeded"
    assert submitter.ended(held).state == "succeeded"
    platform.worker("large", cpus=9, pool="threads")
    assert submitter.ended(never).worker == "large"


def _knowing(platform: Platform) -> None:
    """Start a worker with a GPU, that knows the tasks which report what they hold, and serves two queues."""
    imports = "tests.fixtures.tasks,tests.tasks.choosing"
    queues = ("-Q", "celery,wide")
    platform.worker("x", cpus=4, pool="threads", arguments=queues, PLATFORM_GPUS="1", PLATFORM_IMPORTS=imports)


@pytest.mark.parametrize("queue", ["celery", "wide"])
def test_retry_chooses_anew_among_all_alternatives(platform: Platform, submitter: Submitter, queue: str) -> None:
    _knowing(platform)
    on_the_gpu = submitter.send(HOLD, "gpu", gpus=1)
    tasks.started(platform.redis, "gpu")
    job = submitter.send(reports.name, "gate", 1, queue=queue)
    tasks.started(platform.redis, "gate")
    assert submitter.until(job, "running").request == WIDE
    tasks.let_go(platform.redis, "gpu")
    submitter.ended(on_the_gpu)
    tasks.let_go(platform.redis, "gate", 2)
    assert submitter.ended(job).state == "succeeded"
    assert [_amounts(held) for held in submitter.value(job)] == [WIDE, GPU]
    assert submitter.row(job).request == GPU


def test_replacement_chooses_among_its_own_alternatives(platform: Platform, submitter: Submitter) -> None:
    _knowing(platform)
    job = submitter.send(becomes.name, "gate")
    tasks.started(platform.redis, "gate")
    on_the_gpu = submitter.send(HOLD, "gpu", gpus=1)
    submitter.until(on_the_gpu, "waiting")
    tasks.let_go(platform.redis, "gate")
    tasks.started(platform.redis, "gpu")
    tasks.started(platform.redis, "gate")
    tasks.let_go(platform.redis, "gate")
    assert [_amounts(held) for held in submitter.value(job)] == [GPU, WIDE]
    tasks.let_go(platform.redis, "gpu")
    assert submitter.ended(on_the_gpu).state == "succeeded"


def _amounts(held: dict[str, int]) -> dict[str, int]:
    """Return a request without the queue that it is for."""
    return {name: amount for name, amount in held.items() if name in ("cpus", "gpus", "slots")}


def test_many_jobs_take_alternatives_and_the_waiting_show_all(platform: Platform, submitter: Submitter) -> None:
    platform.worker("x", cpus=4, pool="threads", PLATFORM_GPUS="1")
    submitter.app.set_current()
    many = submitter.app.submit_many(tasks.hold, [("gate",)] * 3, requests=GPU_OR_CPUS)
    jobs = [result.id for result in many]
    for _ in range(2):
        tasks.started(platform.redis, "gate")
    waiting = submitter.until(jobs[2], "waiting").id
    shown = [json.loads(platform.celery("job", job, "--json").stdout) for job in jobs]
    assert [job["request"] for job in shown] == [GPU, WIDE, GPU]
    assert [job["alternatives"] for job in shown] == [[], [], [GPU, WIDE]]
    (line,) = json.loads(platform.celery("cluster", "--json").stdout)["backlog"]
    assert (line["request"], line["alternatives"]) == (GPU, [GPU, WIDE])
    words = "1 CPU, 1 gpu, or 3 CPUs"
    assert words in platform.celery("job", waiting).stdout
    assert words in platform.celery("cluster").stdout
    tasks.let_go(platform.redis, "gate", 3)
    assert {submitter.ended(job).state for job in jobs} == {"succeeded"}


@pytest.mark.parametrize(
    ("requests", "why"),
    [
        ([{"cpus": n} for n in range(1, 6)], "requests has 5 alternatives"),
        ([], "requests has 0 alternatives"),
        ({"cpus": 1}, "requests={'cpus': 1} is not valid"),
        ([{"cpu": 1}], "requests: 'cpu' is not known"),
        ([{"cpus": "many"}], "cpus='many'"),
    ],
)
def test_wrong_alternatives_are_refused_with_their_value(submitter: Submitter, requests: object, why: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        submitter.send(ADD, 1, 2, requests=requests)
    assert why in str(caught.value)
    assert caught.value.advice


@pytest.mark.parametrize("queue", ["a!b", "a;b", "a|b"])
def test_alternatives_are_refused_in_a_queue_that_would_split_them(submitter: Submitter, queue: str) -> None:
    with pytest.raises(InvalidRequest, match="takes no alternatives"):
        submitter.send(ADD, 1, 2, requests=[{"gpus": 1}, {"cpus": 2}], queue=queue)
