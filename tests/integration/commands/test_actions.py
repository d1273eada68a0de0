"""The commands that act on jobs: `submit`, `wait`, `cancel`, `retry`."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.inspect.job_events import channel
from celery_capacity.workers.client import cancel as cancelling
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures import tasks
from tests.fixtures.documents.shapes import assert_shape
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.commanding import Run, in_process
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.processes.terminals import Terminal, on_terminal
from tests.fixtures.waiting import until

ADD, FAIL, HOLD = (f"tests.fixtures.tasks.{name}" for name in ("add", "fail", "hold"))
REPORT = "tests.tasks.reporting.report"


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("actions"), "tests.tasks.reporting") as running:
        running.worker("a", cpus=2)
        yield running


@pytest.fixture
def run(platform: Platform) -> Run:
    return in_process(platform.environment)


def answer(run: Run, *words: str, code: Exit = Exit.OK) -> Any:
    """Return the JSON that a command printed, after checking its shape and exit code."""
    result = run(*words, "--json")
    assert result.exit_code == code, result.output
    value = json.loads(result.stdout)
    assert_shape(words[0], value)
    return value


def problem(run: Run, *words: str, code: Exit = Exit.FAILED) -> Any:
    """Return the error that a command printed as the only object on stdout."""
    result = run(*words, "--json")
    assert result.exit_code == code, result.output
    value = json.loads(result.stdout)
    assert_shape("error", value)
    return value


# -- submit


def test_submit_prints_the_id_alone(run: Run, submitter: Submitter) -> None:
    result = run("submit", ADD, "--args", "[1, 2]", "--priority", "9")
    assert (result.exit_code, result.stderr) == (0, "")
    job = result.stdout.strip()
    assert submitter.value(job) == 3
    assert submitter.row(job).priority == 9


def test_submit_overrides_the_declared_request(run: Run, submitter: Submitter) -> None:
    words = ("--cpus", "0.5", "--memory", "2GiB", "--resource", "licence=1", "--queue", "render", "--countdown", "3600")
    made = answer(run, "submit", ADD, "--kwargs", '{"x": 1, "y": 2}', *words)
    assert made["request"] == {"cpus": 0.5, "memory": 2 * 1024**3, "licence": 1, "slots": 1} | {
        name: value for name, value in made["request"].items() if name.startswith("queue")
    }
    assert (made["state"], made["queue"], made["new"]) == ("scheduled", "render", True)
    assert submitter.row(made["id"]).declared


def test_submit_unique_names_the_equal_job(run: Run) -> None:
    words = ("submit", ADD, "--args", "[4, 5]", "--unique", "--countdown", "3600")
    first, second = answer(run, *words), answer(run, *words)
    assert (first["id"], first["new"], second["new"]) == (second["id"], True, False)
    assert answer(run, "cancel", first["id"])[0]["became"] == "cancelled"


def test_submit_after_and_wait(run: Run, submitter: Submitter, platform: Platform) -> None:
    first = run("submit", HOLD, "--args", '["after"]').stdout.strip()
    threading.Timer(0.5, tasks.let_go, (platform.redis, "after")).start()
    made = answer(run, "submit", ADD, "--args", "[1, 2]", "--after", first, "--wait")
    assert made["state"] == "succeeded"
    assert submitter.ended(first).state == "succeeded"


def test_submit_wait_tells_by_its_code_how_the_job_ended(run: Run) -> None:
    failed = run("submit", FAIL, "--args", '["no"]', "--wait")
    assert (failed.exit_code, failed.stderr.strip()) == (Exit.FAILED, "failed")
    late = run("submit", ADD, "--countdown", "3600", "--wait", "--timeout", "0.2")
    assert (late.exit_code, late.stderr.strip()) == (Exit.TIMED_OUT, "not ended after 0.2 s")
    run("cancel", late.stdout.strip())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--args", "1, 2"), "is not JSON"),
        (("--args", '{"x": 1}'), "--args '{\"x\": 1}' is not valid"),
        (("--kwargs", "[1]"), "--kwargs '[1]' is not valid"),
        (("--cpus", "many"), "--cpus='many' is not a number of CPUs"),
        (("--memory", "2 elephants"), "is not an amount of memory"),
        (("--gpus", "1.5"), "--gpus='1.5' is not a whole number"),
        (("--resource", "licence"), "--resource 'licence' is not valid"),
        (("--after", "nobody"), "after: 'nobody' is not the id of a job"),
    ],
)
def test_submit_refuses_bad_values_before_anything_is_written(
    run: Run, submitter: Submitter, words: tuple[str, ...], says: str
) -> None:
    before = submitter.jobs()
    assert says in problem(run, "submit", ADD, *words)["detail"]
    assert submitter.jobs() == before


def test_submit_warns_of_a_task_that_nobody_declared(run: Run) -> None:
    result = run("submit", "tests.fixtures.tasks.ad")
    assert result.exit_code == 0
    assert "no worker has declared the task tests.fixtures.tasks.ad" in result.stderr
    assert f"Did you mean {ADD}?" in result.stderr
    assert answer(run, "cancel", result.stdout.strip())[0]["became"] == "cancelled"


# -- wait


def test_wait_says_how_each_job_ended(run: Run, submitter: Submitter, platform: Platform) -> None:
    good, bad = submitter.send(ADD, 1, 2), submitter.send(FAIL, "no")
    put_off = submitter.send(ADD, 1, 2, countdown=3600)
    assert answer(run, "wait", good)[0]["state"] == "succeeded"
    assert answer(run, "wait", put_off, good, "--timeout", "0.2", code=Exit.TIMED_OUT)[0]["ended"] is False
    submitter.app.control.revoke(put_off)
    assert [job["state"] for job in answer(run, "wait", put_off, good, code=Exit.CANCELLED)] == [
        "cancelled",
        "succeeded",
    ]
    assert run("wait", good, bad, put_off).exit_code == Exit.FAILED
    lines = run("wait", good, bad).stdout.splitlines()
    assert sorted(lines) == sorted([f"{good}  succeeded", f"{bad}  failed"])


def test_wait_hears_of_the_end(run: Run, submitter: Submitter, platform: Platform) -> None:
    job = submitter.send(HOLD, "heard")
    tasks.started(platform.redis, "heard")

    def end_while_heard() -> None:
        until(lambda: platform.redis.pubsub_numsub(channel(job))[0][1], "the command hears of the job")
        tasks.let_go(platform.redis, "heard")

    threading.Thread(target=end_while_heard).start()
    (awaited,) = answer(run, "wait", job)
    assert (awaited["id"], awaited["state"], awaited["ended"], awaited["attempt"]) == (job, "succeeded", True, 1)


def test_wait_refuses_unknown_ids(run: Run, submitter: Submitter) -> None:
    job = submitter.send(ADD, 1, 2)
    error = problem(run, "wait", job, "nobody")
    assert (error["reference"], error["value"]) == ("unknown-job", "'nobody'")
    assert run("wait").exit_code == Exit.USAGE


# -- cancel


def test_cancel_says_what_became_of_each_job(run: Run, submitter: Submitter, platform: Platform) -> None:
    running = submitter.send(HOLD, "cancel", cpus=2)
    tasks.started(platform.redis, "cancel")
    waiting, ended = submitter.send(ADD, 1, 2), submitter.send(ADD, 1, 2, expires=0.01)
    submitter.ended(ended)
    cancelled = {job["id"]: job for job in answer(run, "cancel", running, waiting, ended)}
    assert {job: cancelled[job]["became"] for job in cancelled} == {
        running: "runs-on", waiting: "cancelled", ended: "ended-before",
    }  # fmt: skip
    assert cancelled[running]["worker"] == "a"
    assert "goes on to its end, no attempt follows" in run("cancel", running).stdout
    assert answer(run, "cancel", running, "--terminate")[0]["became"] == "terminating"
    assert submitter.ended(running).state == "cancelled"
    good = submitter.send(ADD, 1, 2)
    submitter.ended(good)
    assert answer(run, "cancel", good, code=Exit.FAILED)[0]["state"] == "succeeded"


def test_cancel_by_task_group_and_state_asks_first(run: Run, submitter: Submitter) -> None:
    from celery import group

    signatures = [submitter.app.signature(ADD, (1, number), options={"countdown": 3600}) for number in range(3)]
    many = group(signatures, app=submitter.app).apply_async()
    other = submitter.send(FAIL, "no", countdown=3600)
    error = problem(run, "cancel", "--group", many.id)
    assert (error["reference"], "Cancel 3 jobs?" in error["detail"]) == ("declined", True)
    assert submitter.row(other).state == submitter.row(many.results[0].id).state == "scheduled"
    assert {job["became"] for job in answer(run, "cancel", "--group", many.id, "--yes")} == {"cancelled"}
    assert [job["id"] for job in answer(run, "cancel", "--task", FAIL, "--state", "scheduled", "--force")] == [other]
    assert run("cancel", "--task", FAIL, "--yes").stdout == "no jobs\n"


def test_cancel_terminates_a_job_that_started_after_the_first_step(
    submitter: Submitter, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancelling, "STEP", 1)
    first = submitter.send(HOLD, "step one", cpus=2)
    tasks.started(platform.redis, "step one")
    second = submitter.send(HOLD, "step two", cpus=2)
    cancellations = cancelling.cancel(submitter.app, submitter.app.platform, [first, second], terminate=True)
    assert next(cancellations).became == "terminating"
    tasks.started(platform.redis, "step two")
    assert next(cancellations).became == "terminating"
    assert {submitter.ended(job).state for job in (first, second)} == {"cancelled"}


def test_cancel_refuses_what_it_cannot_mean(run: Run, submitter: Submitter) -> None:
    job = submitter.send(ADD, 1, 2, countdown=3600)
    assert problem(run, "cancel", job, "nobody")["reference"] == "unknown-job"
    assert submitter.row(job).state == "scheduled"
    assert problem(run, "cancel", job, "--task", ADD, code=Exit.USAGE)["reference"] == "usage"
    assert problem(run, "cancel", code=Exit.USAGE)["reference"] == "usage"
    assert problem(run, "cancel", "--state", "failed", code=Exit.USAGE)["reference"] == "usage"
    assert run("cancel", job).exit_code == Exit.OK


# -- retry


def test_retry_links_the_new_job_to_the_old(run: Run, submitter: Submitter) -> None:
    job = submitter.send(FAIL, "retry")
    submitter.ended(job)
    new = answer(run, "retry", job)[0]["retried_as"]
    assert submitter.ended(new).error == submitter.row(job).error
    refused = answer(run, "retry", job, code=Exit.FAILED)[0]["refused"]
    assert (refused["reference"], new in refused["detail"]) == ("not-retried", True)
    again = answer(run, "retry", job, "--again")[0]["retried_as"]
    shown = json.loads(run("job", job, "--json").stdout)
    assert (shown["retried_as"], shown["retry_of"]) == ([new, again], None)
    assert json.loads(run("job", new, "--json").stdout)["retry_of"] == job
    assert f"retry of {job}" in " ".join(run("job", new).stdout.split())
    assert f"retried as {new}, {again}" in " ".join(run("job", job).stdout.split())


def test_retry_failed_takes_each_job_once(run: Run, submitter: Submitter) -> None:
    task = "tests.fixtures.tasks.fail"
    run("retry", "--failed", "--yes")
    before = {submitter.send(FAIL, f"no {number}") for number in range(3)}
    for job in before:
        submitter.ended(job)
    assert problem(run, "retry", "--failed", "--since", "2h")["reference"] == "declined"
    first = answer(run, "retry", "--failed", "--task", task, "--since", "1h", "--yes")
    assert {job["id"] for job in first} >= before
    for job in first:
        submitter.ended(job["retried_as"])
    # A retried job is not taken again. Its retry, which failed itself, is.
    second = answer(run, "retry", "--failed", "--task", task, "--yes")
    assert {job["id"] for job in second} == {job["retried_as"] for job in first}
    for job in second:
        submitter.ended(job["retried_as"])
    assert run("retry", "--failed", "--task", "nobody.knows", "--yes").stdout == "no jobs\n"


def test_retry_refuses_with_a_reason(run: Run, submitter: Submitter, platform: Platform) -> None:
    active, done = submitter.send(ADD, 1, 2, countdown=3600), submitter.send(ADD, 1, 2)
    submitter.ended(done)
    details = [job["refused"]["detail"] for job in answer(run, "retry", active, done, code=Exit.FAILED)]
    assert "has not ended, it is scheduled" in details[0]
    assert "has succeeded" in details[1]
    assert submitter.value(answer(run, "retry", done, "--again")[0]["retried_as"]) == 3
    assert problem(run, "retry", "nobody")["reference"] == "unknown-job"
    assert problem(run, "retry", "--failed", "--since", "soon", code=Exit.USAGE)["reference"] == "usage"
    assert problem(run, "retry", done, "--since", "2h", code=Exit.USAGE)["reference"] == "usage"
    run("cancel", active)


def test_retry_respects_the_limit_of_the_backlog(platform: Platform, submitter: Submitter) -> None:
    job = submitter.send(FAIL, "limit")
    submitter.ended(job)
    waiting = submitter.send(ADD, 1, 2, cpus=50)
    run = in_process({**platform.environment, "PLATFORM_MAX_BACKLOG": "1"})
    refused = answer(run, "retry", job, code=Exit.FAILED)[0]["refused"]
    assert refused["reference"] == "backlog-full"
    assert submitter.row(job).state == "failed"
    assert json.loads(run("job", job, "--json").stdout)["retried_as"] == []
    run("cancel", waiting)


# -- progress


def test_progress_is_shown_by_job_jobs_and_info(run: Run, submitter: Submitter, platform: Platform) -> None:
    job = submitter.send(REPORT, "progress", [[3, 10, "frames"]])
    tasks.started(platform.redis, "progress")
    shown = until(lambda: json.loads(run("job", job, "--json").stdout)["progress"], "progress is in the row")
    assert (shown["current"], shown["total"], shown["message"]) == (3, 10, "frames")
    listed = {line["id"]: line for line in json.loads(run("jobs", "--json").stdout)}
    assert listed[job]["progress"] == shown
    assert "3 of 10 (30%), frames" in run("job", job).stdout
    tasks.let_go(platform.redis, "progress")
    submitter.ended(job)


def test_wait_draws_a_bar_of_the_progress_on_a_terminal(submitter: Submitter, platform: Platform) -> None:
    job = submitter.send(REPORT, "drawn", [[3, 10, "frames"]])
    tasks.started(platform.redis, "drawn")
    arguments = [sys.executable, "-m", "celery", "-A", "platform", "wait", job, "--timeout", "2"]
    shown = on_terminal(arguments, platform.environment, platform.folder)
    assert shown.code == Exit.TIMED_OUT
    assert "3 of 10 frames" in shown.screen
    assert "━" in shown.screen
    assert f"not ended after 2 s: {job}" in shown.screen
    tasks.let_go(platform.redis, "drawn")
    submitter.ended(job)


def test_cancel_asks_on_a_terminal(submitter: Submitter, platform: Platform) -> None:
    task = "tests.tasks.reporting.report_by_state"
    jobs = [submitter.send(task, "", {}, countdown=3600) for _ in range(2)]
    arguments = [sys.executable, "-m", "celery", "-A", "platform", "cancel", "--task", task]
    shown = on_terminal(arguments, platform.environment, platform.folder, typed="n\n")
    assert shown.code == Exit.FAILED
    assert "Cancel 2 jobs? [y/N]" in shown.screen
    assert {submitter.row(job).state for job in jobs} == {"scheduled"}
    shown = on_terminal(arguments, platform.environment, platform.folder, typed="y\n")
    assert shown.code == Exit.OK
    assert {submitter.row(job).state for job in jobs} == {"cancelled"}


def test_ctrl_c_ends_a_wait_and_leaves_the_cursor(submitter: Submitter, platform: Platform) -> None:
    job = submitter.send(ADD, 1, 2, countdown=3600)
    words = (sys.executable, "-m", "celery", "-A", "platform", "wait", job)
    terminal = Terminal(words, platform.environment, platform.folder)
    try:
        terminal.wait_for("0 of 1 ended, scheduled")
        terminal.press_ctrl_c()
        assert terminal.wait(60) == Exit.INTERRUPTED
        screen = terminal.wait_for("\x1b[?25h")
    finally:
        terminal.stop()
    assert screen.rindex("\x1b[?25h") > screen.rindex("\x1b[?25l")
    assert "Traceback" not in screen
    submitter.app.control.revoke(job)


def test_wait_shows_ends_above_the_bars_and_messages_escaped(submitter: Submitter, platform: Platform) -> None:
    job = submitter.send(REPORT, "escaped", [[3, 10, "\x1b]0;PWNED\x07frames\nmore"]])
    tasks.started(platform.redis, "escaped")
    other = submitter.send(ADD, 1, 2)
    submitter.ended(other)
    arguments = [sys.executable, "-m", "celery", "-A", "platform", "wait", job, other, "--timeout", "10"]
    shown = on_terminal(arguments, platform.environment, platform.folder)
    assert shown.code == Exit.TIMED_OUT
    assert "3 of 10 \\x1b]0;PWNED\\x07frames more" in shown.screen
    assert "\x1b]0;" not in shown.screen
    # The bar's line is erased before the end is written in its place.
    assert f"\x1b[2K{other}  succeeded\r\n" in shown.screen
    tasks.let_go(platform.redis, "escaped")
    submitter.ended(job)


def test_wait_of_no_time_tells_of_a_job_that_ended_before(run: Run, submitter: Submitter) -> None:
    job = submitter.send(ADD, 1, 2)
    submitter.ended(job)
    assert answer(run, "wait", job, "--timeout", "0")[0]["state"] == "succeeded"


def test_wait_outlives_a_break_of_postgres_on_a_terminal(submitter: Submitter, platform: Platform) -> None:
    job = submitter.send(REPORT, "broken", [[3, 10, "frames"]])
    tasks.started(platform.redis, "broken")
    words = (sys.executable, "-m", "celery", "-A", "platform", "wait", job)
    terminal = Terminal(words, platform.environment, platform.folder)
    try:
        terminal.wait_for("3 of 10 frames")
        with platform.engine.connect() as connection:
            end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND "
            assert connection.execute(text(f"{end} datname = current_database()")).scalar_one()
        terminal.wait_for("0 of 1 ended, running")
        tasks.let_go(platform.redis, "broken")
        assert terminal.wait() == Exit.OK
        assert f"{job}  succeeded" in terminal.screen
    finally:
        terminal.stop()
