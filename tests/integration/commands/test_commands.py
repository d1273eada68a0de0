"""The commands that only read: their output for people and for programs, and their exit codes."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result

from celery_capacity import migrations
from celery_capacity.platform.commands.job import command as job_command
from celery_capacity.platform.console.job_ids import complete_id
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.store import quarantine
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.processes.commanding import Run, in_process
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.stores.books import job_field
from tests.fixtures.stores.staged import Stage

#: The reasons for which a message is set aside.
SET_ASIDE = [refusal for refusal in Refusal if refusal.startswith("set_aside.")]


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


def test_cluster_before_the_first_worker_says_so(run: Run) -> None:
    result = run("cluster")
    assert result.stdout.splitlines()[0] == "no workers yet"
    assert result.stderr == "No worker has started yet. Start one: `celery -A platform worker`.\n"


def test_cluster_lists_blocked_jobs_first_with_the_reason(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=4000)
    stage.submit(cpus=3000, priority=9)
    stage.submit(cpus=64_000)
    stage.submit(cpus=1000, gpus=1)
    backlog = _json(run("cluster", "--json"))["backlog"]
    assert [line["blocked"] for line in backlog] == ["too-large", "unknown-resource", None]
    lines = run("cluster").stdout.splitlines()
    assert lines[-4].split() == ["request", "waiting", "oldest", "blocked"]
    assert lines[-3].startswith("64 CPUs")
    assert lines[-3].endswith("larger than every worker")
    assert lines[-2].endswith("no worker has such a resource")


def test_cluster_marks_a_silent_worker(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    stage.worker("b", cpus=4000)
    late = (datetime.now(UTC) - timedelta(seconds=40)).isoformat(timespec="milliseconds")
    stage.redis.hset(keys.view("b"), "heartbeat_at", late)
    lines = {line.split()[0]: line for line in run("cluster").stdout.splitlines() if line}
    assert re.search(r"silent 4\d s$", lines["b"])
    assert lines["a"].endswith(" ago")
    patient = run("cluster", PLATFORM_RENEW_INTERVAL="30").stdout
    assert "silent" not in patient


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


def test_jobs_are_filtered_and_counted(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=1000)
    stage.worker("b", cpus=2000)
    first, second, third = (stage.submit(cpus=cpus) for cpus in (1000, 2000, 1000))
    stage.end(second, "failed")

    def ids(*options: str) -> set[str]:
        return {job["id"] for job in _json(run("jobs", "--json", *options))}

    assert ids("--worker", "b") == {second, third}
    assert ids("--worker", "*", "--state", "admitted") == {first, third}
    assert ids("--failed") == {second}
    assert ids("--failed", "--state", "admitted", "--worker", "b") == {second, third}
    assert ids("--task", "ta*") == {first, second, third}
    assert ids("--task", "ta") == set()
    assert ids("--task", "t_sk") == set()
    assert ids("--queue", "celery", "--since", "1h", "--limit", "2") == {second, third}
    assert ids("--group", first) == set()
    assert run("jobs", "--count").stdout == "3\n"
    assert run("jobs", "--count", "--failed", "--since", "15min").stdout == "1\n"
    assert _json(run("jobs", "--count", "--worker", "a", "--json")) == 1


@pytest.mark.parametrize("text", ["soon", "0s", "-1h", "1 year", "99999999d", "1e3"])
def test_jobs_refuses_what_is_no_time(run: Run, text: str) -> None:
    result = run("jobs", f"--since={text}")
    assert result.exit_code == Exit.USAGE
    assert f"'{text}' is no time. Write 30s, 15min" in result.stderr


def test_jobs_shows_age_waited_ran_and_no_empty_column(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    job = stage.submit(cpus=1000)
    header = run("jobs").stdout.splitlines()[0].split()
    assert header == ["id", "task", "state", "age", "waited", "ran", "worker", "request"]
    stage.start(job)
    stage.end(job, "failed")
    stage.sql("UPDATE jobs SET error = 'ValueError: no' WHERE id = :job", job=job)
    header, line = (line.split() for line in run("jobs").stdout.splitlines())
    assert header[-1] == "error"
    assert line[-2:] == ["ValueError:", "no"]


def test_job_takes_the_beginning_of_an_id(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    jobs = [stage.submit(cpus=1000) for _ in range(2)]
    ambiguous = run("job", "job-")
    assert ambiguous.exit_code == Exit.FAILED
    assert f"more than one job id begins with job-. Type more of the id. Some of them: {', '.join(jobs)}." in (
        ambiguous.stderr
    )
    stage.sql("UPDATE jobs SET id = 'e4855c54-e3fb' WHERE id = :job", job=jobs[1])
    assert _json(run("job", "e485", "--json"))["id"] == "e4855c54-e3fb"
    assert run("job", "e48").exit_code == Exit.FAILED
    stage.sql("UPDATE jobs SET id = :job WHERE id = 'e4855c54-e3fb'", job=jobs[1])


def test_ids_of_jobs_are_completed(
    stage: Stage, platform_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stage.submit(cpus=1000), stage.submit(cpus=1000)
    context, parameter = click.Context(job_command), job_command.params[0]
    for name, value in platform_environment.items():
        monkeypatch.setenv(name, value)
    assert complete_id(context, parameter, "") == [second, first]
    assert complete_id(context, parameter, first) == [first]
    assert complete_id(context, parameter, "x") == []
    monkeypatch.setenv("DATABASE_URL", "postgresql://me@127.0.0.1:1/platform")
    assert complete_id(context, parameter, "") == []


def test_job_that_waits_again_shows_no_worker_and_no_times_of_the_attempt(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    job = stage.submit(cpus=4000)
    stage.start(job)
    other = stage.submit(cpus=4000, priority=9)
    stage.end(job, "handed_back")
    assert stage.row(other).state == "admitted"
    lines = run("job", job).stdout.splitlines()
    labels = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert labels[:7] == ["id", "task", "state", "request", "priority", "submitted", "waits:"]
    assert lines[-1].split()[0] == "1"


def test_job_shows_its_error_indented_and_last(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    job = stage.submit(cpus=1000)
    stage.start(job)
    stage.end(job, "failed")
    stage.sql("UPDATE jobs SET error = :error WHERE id = :job", job=job, error="Traceback:\n  File a\nValueError: no")
    assert run("job", job).stdout.endswith("\nerror\n    Traceback:\n      File a\n    ValueError: no\n")


def set_aside(stage: Stage) -> None:
    """Set a message aside for each reason of the quarantine; the last reason is the newest."""
    for refusal in SET_ASIDE:
        with stage.engine.begin() as connection:
            quarantine.write(connection, [quarantine.SetAside.of(b"?", "celery", refusal, f"it is {refusal.word}")])


def test_jobs_lists_messages_that_were_set_aside_by_reason(stage: Stage, run: Run) -> None:
    assert run("jobs", "--set-aside").stdout == "no message was set aside\n"
    set_aside(stage)
    words = [refusal.word for refusal in reversed(SET_ASIDE)]
    assert len(words) == 9
    first, header, *rows = run("jobs", "--set-aside").stdout.splitlines()
    assert (first[:24], header.split()[0]) == ("9 messages were set asid", "reason")
    assert [row.split()[0] for row in rows if row.strip("─- ")] == words
    listed = _json(run("jobs", "--set-aside", "--json"))
    assert [(entry["reason"], entry["detail"]) for entry in listed["reasons"]] == [(w, f"it is {w}") for w in words]
    assert run("jobs", "--set-aside", "--count").stdout == "9\n"
    assert len(_json(run("jobs", "--set-aside", "--limit", "2", "--json"))["reasons"]) == 2


def test_jobs_names_reasons_of_messages_set_aside_since_its_oldest(stage: Stage, run: Run) -> None:
    set_aside(stage)
    named = (
        "messages were set aside meanwhile: outbox, unwritable, no_transition, foreign, no_job; more with --set-aside"
    )
    assert run("jobs").stdout.splitlines() == ["no jobs", named]
    stage.submit()
    assert "set aside" not in run("jobs").stdout


def test_jobs_refuses_conditions_on_messages_that_were_set_aside(run: Run) -> None:
    refused = run("jobs", "--set-aside", "--failed")
    assert (refused.exit_code, "no condition on jobs" in refused.stderr) == (Exit.USAGE, True)
    refused = run("jobs", "--set-aside", "--failed", "--json")
    assert (refused.exit_code, "no condition on jobs" in _json(refused)["detail"]) == (Exit.USAGE, True)


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


def test_verify_shows_messages_that_were_set_aside_by_reason(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    set_aside(stage)
    result = run("verify")
    assert result.exit_code == Exit.OK, result.stdout
    assert "9 messages were set aside" in result.stdout
    assert "it is unwritable" in result.stdout
    seen = _json(run("verify", "--json"))["quarantine"]
    assert (seen["messages"], seen["reasons"][0]["reason"]) == (9, "outbox")
    assert _json(run("verify", "--worker", "a", "--json"))["quarantine"] is None


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


def test_verify_during_a_lapse_names_what_silent_workers_hold(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    stage.worker("b", cpus=8000)
    job = stage.submit(cpus=4000)
    assert stage.row(job).worker == "a"
    lease = stage.redis.hget(keys.book("a"), "lease") or b""
    stage.redis.hset(keys.book("a"), "lease", "1")
    lines = run("verify").stdout.splitlines()
    stage.redis.hset(keys.book("a"), "lease", lease)
    assert "total 8 CPUs, allocated 0, available 8, utilisation 0%; 4 more on workers that went silent" in lines[3]
    assert "(4 CPUs allocated, 4 of them on workers that went silent, until their jobs are taken back)" in lines[7]


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
    assert "2 FAILED: the heartbeat of worker 'b' is late" in late.stdout
    value = _json(run("verify", "--worker", "a", "--json"))
    assert (value["ok"], value["passed"], value["invariants"]) == (True, 2, None)
    assert value["not_judged"] == "only a was asked about"


def test_verify_of_a_worker_that_is_not_there_fails(stage: Stage, run: Run) -> None:
    stage.worker("a", cpus=4000)
    stage.redis.delete(keys.view("a"))
    result = run("verify", "--worker", "a")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (Exit.FAILED, "0/2")
    assert "1 FAILED: worker 'a' is not registered\n         no live worker is named a" in result.stdout


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
    assert "scheduler state rebuilt: epoch 2 was opened with 0 workers, 0 held and 1 waiting jobs" in result.stdout
    assert job_field(stage.redis, job, "state") == b"waiting"


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
    # The books are read after each test, in the tables of today.
    assert run("db", "upgrade").exit_code == Exit.OK


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


def test_settings_lists_values_defaults_and_what_is_wrong(run: Run) -> None:
    result = run("settings", PLATFORM_CPUS="many", CELERY_BROKER_URL="amqp://me:secret@host/x")
    assert result.exit_code == Exit.FAILED
    assert "PLATFORM_CPUS = many (CPUs)   default: detected\n    CPUs that this worker publishes.\n    wrong: " in (
        result.stdout
    )
    assert "amqp://me:***@host/x" in result.stdout
    assert "secret" not in result.output
    lines = _json(run("settings", "--set", "--json", PLATFORM_CPUS="4"))
    (cpus,) = [line for line in lines if line["name"] == "PLATFORM_CPUS"]
    assert (cpus["value"], cpus["problem"], cpus["unit"]) == ("4", None, "CPUs")
    assert all(line["value"] is not None for line in lines)


def test_settings_never_shows_the_content_of_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "url").write_text("postgresql://me:secret@host/x")
    words = ("settings", "--set")
    result = run(*words, DATABASE_URL="", DATABASE_URL_FILE=str(tmp_path / "url"))
    assert f"DATABASE_URL = the URL in the file {tmp_path / 'url'}" in result.stdout
    assert "me:" not in result.stdout


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
