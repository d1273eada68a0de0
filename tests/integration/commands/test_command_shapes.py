"""The commands' output with --json matches its schema, in every state that a platform can be in."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from celery_capacity.migrations import downgrade
from celery_capacity.platform.demo import trace
from celery_capacity.platform.demo.replay import Replayed, Report, WorkerLine
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.inspect import verify
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.states import State
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures import tasks
from tests.fixtures.documents.shapes import assert_shape, commands, prints_json
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.commanding import Run, in_process
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.stores.staged import Stage
from tests.fixtures.waiting import until

ADD, FAIL, HOLD = "tests.fixtures.tasks.add", "tests.fixtures.tasks.fail", "tests.fixtures.tasks.hold"
GATE = "shapes"

#: A Postgres and a Redis that nobody can reach.
NO_POSTGRES = "postgresql://me:secret@127.0.0.1:1/platform"
NO_REDIS = "redis://127.0.0.1:1/0"
#: The environment of a user without servers.
NO_URLS = {"REDIS_URL": "", "DATABASE_URL": ""}


def answer(run: Run, *words: str, code: Exit | None = Exit.OK, **environment: str) -> Any:
    """Return the JSON that a command printed, after checking its shape. With None as code the answer may be no."""
    result = run(*words, "--json", **environment)
    assert result.exit_code in ((Exit.OK, Exit.FAILED) if code is None else (code,)), result.output
    value = json.loads(result.stdout)
    assert_shape(" ".join(words[: 2 if words[0] == "db" else 1]), value)
    return value


def problem(run: Run, *words: str, code: Exit, **environment: str) -> Any:
    """Return the error that a command printed as the only object on stdout, with nothing on stderr."""
    result = run(*words, "--json", **environment)
    assert result.exit_code == code, result.output
    assert result.stderr == ""
    value = json.loads(result.stdout)
    assert_shape("error", value)
    return value


# -- a platform at work


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("shapes"), "tests.tasks.ends") as running:
        yield running


@pytest.fixture(scope="module")
def jobs(platform: Platform) -> Iterator[Mapping[str, str]]:
    """Yield the ids of jobs in each state of a platform at work, by the name of the state, on two workers."""
    platform.worker("a", 4, "threads", PLATFORM_GPUS="1", PLATFORM_RESOURCES="licence=3")
    platform.worker("b", 2, "threads")
    submitter = Submitter(platform)
    send = submitter.send
    ids = {
        "succeeded": send(ADD, 1, 2, cpus=0.5),
        "failed": send(FAIL, "the disk is \x1b[31mfull\x00", cpus=1),
        "retried": send("tests.tasks.ends.again", 2, cpus=1),
        "running": send(HOLD, GATE, cpus=4, gpus=1, resources={"licence": 1}),
        "undeclared": send("nobody.knows.this"),
        "unknown-resource": send(ADD, 1, 2, resources={"moon": 1}),
        "too-large": send(ADD, 1, 2, cpus=100, memory="1TiB", priority=9),
        "scheduled": send(ADD, 1, 2, countdown=3600, expires=7200),
        "cancelled": send(ADD, 1, 2, cpus=100),
        "expired": send(ADD, 1, 2, cpus=100, expires=0.2),
    }
    tasks.started(platform.redis, GATE)
    ids |= {"no-room": send(ADD, 1, 2, cpus=3), "behind-shape": send(ADD, 1, 2, cpus=3)}
    submitter.app.control.revoke(ids["cancelled"])
    platform.redis.lpush("celery", b"garbage", b"[]")
    for name, state in {
        **{name: name for name in ("succeeded", "failed", "cancelled", "expired", "running", "scheduled")},
        "retried": "succeeded",
        "undeclared": "waiting",
        "no-room": "waiting",
    }.items():
        submitter.until(ids[name], state)
    run = in_process(platform.environment)
    until(lambda: answer(run, "cluster")["quarantine"]["messages"] == 2, "two messages are set aside")
    until(lambda: answer(run, "cluster")["unapplied"] == 0, "Postgres has what the ledger noted")
    yield ids
    tasks.let_go(platform.redis, GATE)
    submitter.close()


@pytest.fixture
def at_work(platform: Platform, jobs: Mapping[str, str]) -> Run:
    return in_process(platform.environment)


def test_a_cluster_at_work(at_work: Run) -> None:
    seen = answer(at_work, "cluster")
    assert seen["source"] == "ledger"
    assert seen["resources"]["named"]["gpus"] == {"total": 1, "allocated": 1}
    assert {worker["name"] for worker in seen["workers"]} == {"a", "b"}
    assert len(seen["backlog"]) >= 3
    assert len(seen["quarantine"]["reasons"]) == 2


def test_the_list_of_jobs_in_every_state(at_work: Run, jobs: Mapping[str, str]) -> None:
    listed = {job["id"]: job for job in answer(at_work, "jobs")}
    assert set(listed) == set(jobs.values())
    assert {job["state"] for job in listed.values()} >= {
        "succeeded", "failed", "running", "waiting", "scheduled", "cancelled", "expired",
    }  # fmt: skip
    assert answer(at_work, "jobs", "--set-aside") == answer(at_work, "cluster")["quarantine"]
    for state in State:
        assert all(job["state"] == state for job in answer(at_work, "jobs", "--state", state.value))


def test_each_job_whatever_became_of_it(at_work: Run, jobs: Mapping[str, str]) -> None:
    seen = {name: answer(at_work, "job", job) for name, job in jobs.items()}
    whys = {name: shown["why"]["why"] for name, shown in seen.items()}
    assert whys["running"] == "runs"
    assert {whys[name] for name in ("succeeded", "failed", "retried", "cancelled", "expired")} == {"ended"}
    for name in ("unknown-resource", "too-large", "scheduled", "no-room"):
        assert whys[name] == name
    assert [attempt["outcome"] for attempt in seen["retried"]["attempts"]] == ["retried", "retried", "succeeded"]
    assert seen["undeclared"]["declared"] is False
    assert "the disk is" in seen["failed"]["error"]


def test_verify_and_reconcile_while_work_runs(at_work: Run) -> None:
    seen = answer(at_work, "verify")
    assert (seen["passed"], seen["ok"], seen["invariants"]["at_rest"]) == (4, True, False)
    assert len(seen["quarantine"]["reasons"]) == 2
    assert answer(at_work, "reconcile")["all_repaired"] is True


def test_verify_of_one_worker_that_is_there_or_not(at_work: Run) -> None:
    assert answer(at_work, "verify", "--worker", "a")["passed"] == 2
    missing = answer(at_work, "verify", "--worker", "nobody", code=Exit.FAILED)
    assert [check["passed"] for check in missing["checks"]] == [False, False]


def test_a_demo_in_which_jobs_failed() -> None:
    """The report is built by hand, because only a foreign worker or a defect makes a demo's jobs fail."""
    replayed = Replayed("t", (trace.Job(0, 0.0, 1.0, 1000, 2),), 1.0, ())
    record = trace.Record(0, 1.0, 2.0, "gone")
    report = Report(
        replayed=replayed,
        states={"failed": 1},
        errors=((0, "failed", "ValueError('x')"),),
        records=(record, record),
        submitted={0: 0.5},
        summary=trace.summarise((record, record), {0: 0.5}),
        workers=(WorkerLine("gone", None, 1000, 1000, 2),),
        doubled=(0,),
        delay=0.0,
        invariants=verify.Report(False, tuple(verify.Verdict(n, "x", None, True, 0, ()) for n in verify.INVARIANTS)),
    )
    assert report.ok is False
    assert_shape("demo", report.to_json())


@pytest.mark.long
def test_up_and_down_on_embedded_servers(platform: Platform, tmp_path: Path) -> None:
    environment: dict[str, Any] = {**NO_URLS, "PLATFORM_HOME": str(tmp_path / "home")}
    environment["PLATFORM_DASHBOARD"] = "127.0.0.1:0"
    running = platform.start("up", "up", "--json", "--worker", "a=1", "-P", "threads", says='"beat"', **environment)
    started = json.loads(running.wait_for('"beat"'))
    assert_shape("up", started)
    with urllib.request.urlopen(started["dashboard"]["url"], timeout=60) as served:
        assert_shape("cluster", json.load(served))
    running.signal(signal.SIGTERM)
    assert running.wait() == Exit.OK
    for ended in (2, 0):
        done = platform.celery("down", "--json", **environment)
        assert done.returncode == Exit.OK
        assert_shape("down", json.loads(done.stdout))
        assert len(json.loads(done.stdout)["ended"]) == ended


# -- a platform on the stage: what no worker would leave so


@pytest.fixture
def run(platform_environment: dict[str, str]) -> Run:
    return in_process(platform_environment)


def test_an_empty_platform_whose_ledger_was_never_opened(run: Run) -> None:
    assert answer(run, "cluster")["workers"] == []
    assert answer(run, "jobs") == []
    assert answer(run, "verify", code=Exit.FAILED)["passed"] == 0
    assert answer(run, "db", "current")["up_to_date"] is True
    assert answer(run, "reconcile")["rebuilt"]["held"] == 0


def test_attempts_that_came_to_nothing(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    job = stage.submit(cpus=1000)
    for outcome in ("handed_back", "lost", "lost", "lost"):
        stage.start(job)
        stage.end(job, outcome)
    seen = answer(run, "job", job)
    assert (seen["state"], seen["losses"]) == ("lost", 3)
    assert [attempt["outcome"] for attempt in seen["attempts"]] == ["handed_back", "lost", "lost", "lost"]


def test_a_lost_ledger_and_its_rebuilding(stage: Stage, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_capacity.routing.inspect.verify.PATIENCE", 0.1)
    stage.worker("a", cpus=4000)
    held, waiting = stage.submit(cpus=3000), stage.submit(cpus=9000)
    stage.redis.flushdb()
    assert answer(run, "cluster")["source"] == "postgres"
    assert answer(run, "job", held)["why"]["why"] == "runs"
    assert answer(run, "job", waiting)["why"]["why"] == "ledger-closed"
    assert answer(run, "verify", code=Exit.FAILED)["ok"] is False
    assert answer(run, "reconcile")["rebuilt"] == {"epoch": 2, "workers": 1, "held": 1, "filed": 1}


def test_a_redis_that_does_not_answer(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    waiting = stage.submit(cpus=9000)
    assert answer(run, "cluster", REDIS_URL=NO_REDIS)["unapplied"] is None
    assert answer(run, "job", waiting, REDIS_URL=NO_REDIS)["why"]["why"] == "ledger-unreachable"
    seen = answer(run, "verify", code=Exit.FAILED, REDIS_URL=NO_REDIS)
    assert seen["invariants"] is None
    assert "Redis does not answer" in seen["not_judged"]
    assert problem(run, "reconcile", code=Exit.UNAVAILABLE, REDIS_URL=NO_REDIS)["reference"] == "store-unavailable"


def test_jobs_are_acted_on_while_redis_is_away(stage: Stage, run: Run) -> None:
    stage.sql("UPDATE authority SET authority = 'postgres', changed_at = now()")
    stage.sql('INSERT INTO declarations (name, request) VALUES (\'task\', \'{"cpus": 3, "slots": 1, "licence": 2}\')')
    made = answer(run, "submit", "task", "--priority", "4", REDIS_URL=NO_REDIS)
    # Postgres tells what the task declares, since the ledger does not.
    assert made["request"] == {"cpus": 3, "licence": 2, "slots": 1}
    job = made["id"]
    waited = answer(run, "wait", job, "--timeout", "0.5", code=Exit.TIMED_OUT, REDIS_URL=NO_REDIS)
    assert (waited[0]["state"], waited[0]["ended"]) == ("accepted", False)
    assert answer(run, "cancel", job, REDIS_URL=NO_REDIS)[0]["became"] == "cancelled"
    assert answer(run, "wait", job, code=Exit.CANCELLED, REDIS_URL=NO_REDIS)[0]["state"] == "cancelled"
    new = answer(run, "retry", job, REDIS_URL=NO_REDIS)[0]["retried_as"]
    assert answer(run, "job", new, REDIS_URL=NO_REDIS)["retry_of"] == job
    assert answer(run, "cancel", "--task", "task", "--yes", REDIS_URL=NO_REDIS)[0]["id"] == new


def test_postgres_admits_instead_of_the_ledger(stage: Stage, run: Run) -> None:
    waiting = stage.submit(cpus=9000)
    stage.sql("UPDATE authority SET authority = 'postgres'")
    assert answer(run, "cluster")["source"] == "postgres"
    assert answer(run, "job", waiting)["why"]["why"] == Reason.LEDGER_STANDS_BACK.value


def test_drift_and_its_repair(stage: Stage, run: Run) -> None:
    job = stage.submit(cpus=9000)
    stage.redis.delete(keys.wait("cpus=9000,slots=1"), keys.job(job), keys.SHAPES)
    assert answer(run, "reconcile")["kinds"]


@pytest.mark.leaves("I6", because="the command has to see it")
def test_a_broken_invariant(stage: Stage, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_capacity.routing.inspect.verify.PATIENCE", 0.1)
    stage.worker("a", cpus=4000)
    stage.redis.set(keys.ALLOCATED_CPUS, "7")
    (broken,) = [
        verdict
        for verdict in answer(run, "verify", code=Exit.FAILED)["invariants"]["verdicts"]
        if verdict["holds"] is False
    ]
    assert broken["violations"] == len(broken["detail"]) == 1


def test_the_tables_go_down_and_up(run: Run) -> None:
    down = answer(run, "db", "downgrade", "base", "--force")
    assert down["current"] is None
    assert answer(run, "db", "current")["current"] is None
    assert answer(run, "db", "upgrade")["before"] is None


# -- errors


def test_a_postgres_that_does_not_answer(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    # The command shows the ledger's books without Postgres. The number of messages in quarantine is unknown then.
    assert answer(run, "cluster", DATABASE_URL=NO_POSTGRES)["quarantine"] is None
    acts = (
        ("wait", "x"),
        ("cancel", "x"),
        ("cancel", "--task", "x"),
        ("retry", "x"),
        ("retry", "--failed"),
        ("submit", "x"),
        ("cordon", "x"),
        ("drain", "x"),
        ("pause",),
        ("resume", "--queue", "x"),
        ("priority", "x", "5"),
    )
    looks = (("jobs",), ("job", "x"), ("reconcile",), ("db", "current"), ("db", "upgrade"), ("db", "downgrade"))
    for words in (*looks, *acts, ("submit", "x")):
        error = problem(run, *words, code=Exit.UNAVAILABLE, DATABASE_URL=NO_POSTGRES)
        assert error["reference"] == "store-unavailable"
        assert "127.0.0.1" in error["detail"]
        assert "secret" not in json.dumps(error)


@pytest.mark.parametrize(
    "line", ["cluster", "jobs", "verify", "reconcile", "wait x", "cancel x", "retry x", "submit x", "cordon x", "pause"]
)
def test_without_tables_it_is_the_error_that_says_so(run: Run, database_url: str, line: str) -> None:
    downgrade(database_url, "base")
    assert problem(run, *line.split(), code=Exit.CONFIGURATION)["reference"] == "not-migrated"


def test_wrong_settings_are_listed(run: Run) -> None:
    # A simulation reads no settings.
    for name in sorted({"db current", *commands()} - {"dashboard", "db", "settings", "simulate"}):
        named = (
            "job",
            "wait",
            "cancel",
            "retry",
            "submit",
            "cordon",
            "uncordon",
            "drain",
            "tenant set",
            "tenant remove",
            "tail",
            "logs",
        )
        words = [*name.split(), *(["x"] if name in named else ["x", "5"] if name == "priority" else [])]
        error = problem(run, *words, code=Exit.CONFIGURATION, PLATFORM_CPUS="many", PLATFORM_WORKER_TTL="soon")
        assert len(error["problems"]) == 2


def test_a_wrong_command_line_is_an_error_of_the_same_shape(run: Run) -> None:
    for name, command in commands().items():
        if prints_json(command):
            error = problem(run, *name.split(), "--no-such-option", "--", "x", code=Exit.USAGE)
            assert error["reference"] == "usage"
            assert f"celery -A platform {name} --help" in error["advice"]
    assert "'many'" in problem(run, "jobs", "--limit", "many", code=Exit.USAGE)["detail"]


def test_what_is_not_there_is_told_with_its_value(stage: Stage, run: Run) -> None:
    job = stage.submit(cpus=1000)
    error = problem(run, "job", "job-7", code=Exit.FAILED)
    assert (error["reference"], error["value"]) == ("unknown-job", "'job-7'")
    assert job in error["advice"]
    assert problem(run, "job", "a b", code=Exit.FAILED)["value"] == "'a b'"
    assert problem(run, "db", "upgrade", "nope", code=Exit.FAILED)["value"] == "'nope'"
