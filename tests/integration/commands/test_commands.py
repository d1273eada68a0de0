"""The commands that only read: their output for people and for programs, and their exit codes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import Result

from celery_capacity import migrations
from celery_capacity.routing.ledger import keys
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.commanding import Run, in_process
from tests.fixtures.processes import Platform
from tests.fixtures.staged import Stage


@pytest.fixture
def run(platform_environment: dict[str, str]) -> Run:
    """Return `run("jobs", "--json")`: it calls the command as Celery does, in this process."""
    return in_process(platform_environment)


def _json(result: Result) -> Any:
    return json.loads(result.stdout)


# -- cluster
# ---------------------------------------------------------------------------------------------------------


def test_cluster_shows_totals_a_line_for_each_worker_and_the_backlog(stage: Stage, run: Run) -> None:
    stage.worker("big", cpus=72_000)
    stage.worker("small", cpus=4000)
    stage.submit(cpus=3000)
    stage.submit(cpus=100_000)
    result = run("cluster")
    assert result.exit_code == Exit.OK
    assert "2 workers, from the ledger" in result.stdout
    assert "3 of 76 allocated (3.95%), 73 available" in result.stdout
    small = next(line for line in result.stdout.splitlines() if line.startswith("small"))
    assert "3/4" in small
    assert "100 CPUs" in result.stdout


def test_cluster_shows_each_resource_that_a_worker_has(stage: Stage, run: Run) -> None:
    stage.worker("farm", cpus=8000, gpus=2, licence=3)
    stage.worker("plain", cpus=4000)
    stage.submit(cpus=1000, gpus=2)
    lines = run("cluster").stdout.splitlines()
    assert "gpus    2 of 2 allocated" in lines
    assert "licence 0 of 3 allocated" in lines
    header = next(line for line in lines if line.startswith("worker")).split()
    farm, plain = (next(line for line in lines if line.startswith(name)) for name in ("farm", "plain"))
    assert header[4:7] == ["slots", "gpus", "licence"]
    assert farm.split()[-5:-3] == ["2/2", "0/3"]
    assert plain.split()[-5:-3] == ["-", "-"]


def test_cluster_json_is_the_object_of_the_dashboard(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=500)
    seen = _json(run("cluster", "--json"))
    assert seen["resources"]["allocated_cpus"] == 0.5
    assert [worker["name"] for worker in seen["workers"]] == ["a"]
    assert seen["source"] == "ledger"
    assert seen["counters"]["admitted"] == 1


def test_cluster_without_a_ledger_answers_from_postgres_and_says_so(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    stage.redis.flushdb()
    assert _json(run("cluster", "--json"))["source"] == "postgres"
    result = run("cluster")
    assert "from Postgres" in result.stdout
    assert "The ledger cannot be asked: " in result.stderr


# -- jobs, job
# -------------------------------------------------------------------------------------------------------


def test_jobs_lists_the_newest_first(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    ids = [stage.submit(cpus=1000) for _ in range(3)]
    listed = _json(run("jobs", "--json", "--limit", "2"))
    assert [job["id"] for job in listed] == [ids[2], ids[1]]
    assert listed[0]["state"] == "admitted"
    assert listed[0]["request"] == {"cpus": 1, "slots": 1}
    assert listed[0]["submitted_at"].endswith("+00:00")
    assert "the newest 2 of 3" in run("jobs", "--limit", "2").stdout


def test_jobs_of_one_state(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    ended, running = stage.submit(cpus=1000), stage.submit(cpus=1000)
    stage.end(ended, "failed")
    assert [job["id"] for job in _json(run("jobs", "--json", "--state", "failed"))] == [ended]
    text = run("jobs", "--state", "admitted").stdout
    assert running in text
    assert ended not in text
    assert run("jobs", "--state", "sleeping").exit_code == Exit.USAGE


def test_no_jobs_is_an_answer(run: Run) -> None:
    assert run("jobs").stdout == "no jobs\n"
    assert _json(run("jobs", "--json")) == []


def test_job_shows_times_attempts_and_worker(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    job = stage.submit(cpus=1000)
    stage.end(job, "handed_back")
    stage.start(job)
    stage.end(job)
    seen = _json(run("job", job, "--json"))
    assert (seen["state"], seen["worker"], seen["attempt"]) == ("succeeded", "a", 2)
    assert [(attempt["attempt"], attempt["outcome"]) for attempt in seen["attempts"]] == [
        (1, "handed_back"),
        (2, "succeeded"),
    ]
    assert seen["why"]["why"] == "ended"
    text = run("job", job).stdout
    assert "succeeded" in text
    assert "handed_back" in text
    assert "waits:" not in text


def test_job_says_why_it_waits(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    job = stage.submit(cpus=9000)
    seen = _json(run("job", job, "--json"))
    assert seen["why"]["why"] == "too-large"
    assert (seen["why"]["asked"], seen["why"]["free"], seen["why"]["worker"]) == (9, 4, "a")
    assert "waits:    It is too large for every worker: it needs 9 CPUs" in run("job", job).stdout


def test_an_unknown_job_names_the_nearest_ids(stage: Stage, run: Run) -> None:
    job = stage.submit(cpus=1000)
    result = run("job", job.replace("-1", "-7"))
    assert (result.exit_code, result.stdout) == (Exit.FAILED, "")
    assert f"there is no job job-7. The nearest: {job}." in result.stderr
    problem = _json(run("job", "something-else", "--json"))
    assert problem["detail"] == "there is no job something-else. `celery -A platform jobs` lists the newest."


# -- verify, reconcile
# -----------------------------------------------------------------------------------------------


def test_verify_ends_with_four_of_four_and_the_invariants(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    result = run("verify")
    assert result.exit_code == Exit.OK, result.stdout
    assert result.stdout.splitlines()[-2:] == ["4/4", "invariants: I1, I2, I3, I4, I6 hold, at rest"]
    assert "total 4 CPUs, allocated 0, available 4, utilisation 0%" in result.stdout
    assert "100% answered by Redis" in result.stdout


def test_verify_names_what_holds_only_at_rest_while_work_runs(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=1000)
    result = run("verify")
    assert result.exit_code == Exit.OK, result.stdout
    last = result.stdout.splitlines()[-1]
    assert last == "invariants: I1, I4, I6 hold; I2, I3 hold only at rest, and work runs"


def test_verify_without_a_live_worker_fails_and_says_so(stage: Stage, run: Run) -> None:
    assert stage.ledger.allocated_cpus() == "0"
    result = run("verify")
    assert result.exit_code == Exit.FAILED
    assert "no live worker" in result.stdout
    assert result.stdout.splitlines()[-2] == "1/4"


@pytest.mark.leaves("I6", because="the command has to see it")
def test_verify_fails_where_the_books_are_wrong(stage: Stage, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_capacity.routing.inspect.verify.PATIENCE", 0.1)
    stage.worker("a", cpus=4000)
    stage.redis.set(keys.ALLOCATED_CPUS, "7")
    seen = run("verify", "--json")
    assert seen.exit_code == Exit.FAILED
    value = _json(seen)
    assert (value["passed"], value["ok"], value["invariants"]["holds"]) == (4, False, False)
    assert run("verify").stdout.splitlines()[-1] == "invariants: VIOLATED I6"


def test_verify_without_redis_says_what_it_could_not_judge(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    result = run("verify", REDIS_URL="redis://127.0.0.1:1/0")
    assert result.exit_code == Exit.FAILED
    assert "Connection refused" in result.stdout
    *_, passed, verdict = result.stdout.splitlines()
    assert passed == "2/4"
    assert verdict.startswith("invariants: NOT JUDGED, Redis does not answer")
    value = _json(run("verify", "--json", REDIS_URL="redis://127.0.0.1:1/0"))
    assert (value["ok"], value["invariants"]) == (False, None)


def test_verify_of_one_worker_asks_about_no_other(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    stage.worker("b", cpus=4000)
    stage.redis.hset(keys.view("b"), "heartbeat_at", "2026-01-01T00:00:00+00:00")
    result = run("verify", "--worker", "a")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (Exit.OK, "2/2")
    late = run("verify", "--worker", "b")
    assert late.exit_code == Exit.FAILED
    assert "2 FAILED the heartbeat of b is fresh" in late.stdout
    value = _json(run("verify", "--worker", "a", "--json"))
    assert (value["ok"], value["passed"], value["invariants"]) == (True, 2, None)
    assert value["not_judged"] == "only a was asked about"


def test_verify_of_a_worker_that_is_not_there_fails(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    stage.redis.delete(keys.view("a"))
    result = run("verify", "--worker", "a")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (Exit.FAILED, "0/2")
    assert "no live worker is named a" in result.stdout


def test_verify_of_one_worker_needs_no_postgres(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    away = "postgresql://me@127.0.0.1:1/platform"
    assert run("verify", "--worker", "a", DATABASE_URL=away).exit_code == Exit.OK


def test_verify_of_one_worker_tells_a_ledger_that_does_not_answer(run: Run) -> None:
    result = run("verify", "--worker", "a", REDIS_URL="redis://127.0.0.1:1/0")
    assert result.exit_code == Exit.UNAVAILABLE
    assert "Redis does not answer" in result.stderr


def test_reconcile_reports_drift_and_repairs_it(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    assert _json(run("reconcile", "--json"))["drift"] == 0
    job = stage.submit(cpus=9000)
    stage.redis.delete(keys.wait("cpus=9000,slots=1"), keys.job(job), keys.SHAPES)
    done = run("reconcile", "--json")
    assert done.exit_code == Exit.OK
    assert _json(done)["drift"] >= 1
    assert _json(done)["all_repaired"] is True
    assert _json(run("reconcile", "--json"))["drift"] == 0


def test_reconcile_opens_a_cold_ledger(stage: Stage, run: Run) -> None:
    job = stage.submit(cpus=9000)
    stage.redis.flushdb()
    result = run("reconcile")
    assert result.exit_code == Exit.OK, result.stdout
    assert "the ledger was cold: epoch 2 was opened with 0 workers, 0 held and 1 waiting jobs" in result.stdout
    assert stage.redis.hget(keys.job(job), "state") == b"waiting"


# -- db, errors
# ------------------------------------------------------------------------------------------------------


def test_db_goes_down_and_up_and_says_where_it_is(run: Run) -> None:
    assert run("db", "current").stdout == f"{migrations.HEAD}\n"
    assert "already" in run("db", "upgrade").stdout
    assert run("db", "downgrade", "base", "--force").stdout == f"the tables went from {migrations.HEAD} to none\n"
    current = run("db", "current")
    assert current.stdout == "none\n"
    assert "db upgrade" in current.stderr
    assert _json(run("db", "upgrade", "--json")) == {
        "before": None, "current": migrations.HEAD, "head": migrations.HEAD,
    }  # fmt: skip
    assert _json(run("db", "current", "--json"))["up_to_date"] is True


def test_db_downgrade_takes_one_step_back_unless_told_otherwise(run: Run) -> None:
    assert run("db", "downgrade", "-1", "--force").exit_code == Exit.OK
    assert run("db", "current").stdout == f"{int(migrations.HEAD) - 1:04}\n"


def test_db_downgrade_without_a_terminal_needs_force(stage: Stage, run: Run) -> None:
    stage.submit(cpus=1)
    result = run("db", "downgrade", "base")
    assert result.exit_code == Exit.FAILED
    assert "1 job is in the tables" in result.stderr
    assert "--force" in result.stderr
    assert run("db", "current").stdout == f"{migrations.HEAD}\n"


def test_db_refuses_a_revision_that_it_does_not_know(run: Run) -> None:
    result = run("db", "upgrade", "nope")
    assert result.exit_code == Exit.FAILED
    assert "Error: revision 'nope'" in result.stderr


@pytest.mark.parametrize("name", ["cluster", "jobs", "job", "verify", "reconcile"])
def test_without_tables_every_command_says_what_to_run(stage: Stage, run: Run, name: str) -> None:
    stage.redis.flushdb()
    run("db", "downgrade", "base", "--force")
    result = run(name, *(["x"] if name == "job" else []))
    assert result.exit_code == Exit.CONFIGURATION
    assert "Run `celery -A platform db upgrade`" in result.stderr


@pytest.mark.parametrize("name", ["cluster", "jobs", "verify", "reconcile"])
def test_without_stores_every_command_says_so(run: Run, name: str) -> None:
    away = {"REDIS_URL": "redis://127.0.0.1:1/0", "DATABASE_URL": "postgresql://me:secret@127.0.0.1:1/platform"}
    result = run(name, **away)
    assert (result.exit_code, result.stdout) == (Exit.UNAVAILABLE, "")
    assert "127.0.0.1" in result.stderr
    assert "secret" not in result.output


def test_wrong_settings_are_told_together(run: Run) -> None:
    result = run("cluster", PLATFORM_CPUS="many", PLATFORM_WORKER_TTL="soon")
    assert result.exit_code == Exit.CONFIGURATION
    assert "PLATFORM_CPUS" in result.stderr
    assert "PLATFORM_WORKER_TTL" in result.stderr


def test_a_slip_in_the_name_of_a_setting_is_told_beside_the_facts(run: Run) -> None:
    result = run("jobs", PLATFORM_WORKR_TTL="60")
    assert (result.exit_code, result.stdout) == (Exit.OK, "no jobs\n")
    assert result.stderr.startswith("Warning: PLATFORM_WORKR_TTL is not a setting")
    assert "PLATFORM_WORKER_TTL" in result.stderr


def test_a_real_command_line_keeps_facts_and_talk_apart(platform: Platform) -> None:
    shown = platform.celery("cluster", "--json")
    assert shown.returncode == Exit.OK, shown.stderr
    assert json.loads(shown.stdout)["source"] == "postgres"
    missing = platform.celery("job", "nothing")
    assert (missing.returncode, missing.stdout) == (Exit.FAILED, "")
    assert missing.stderr.startswith("Error: there is no job nothing.")
