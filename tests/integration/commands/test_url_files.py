"""Commands whose URLs stand in files: they work as with URLs in the environment, and keep them out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from celery_capacity.routing.config.secret_files import FROM_FILES
from tests.fixtures.processes.platforms import Platform


def in_files(platform: Platform, folder: Path) -> dict[str, Any]:
    """Return variables that take the platform's own two URLs from files: emptied URLs, and the names of the files."""
    environ: dict[str, Any] = {}
    for env in ("REDIS_URL", "DATABASE_URL"):
        file = folder / env.lower()
        file.write_text(platform.environment[env] + "\n")
        environ |= {env: "", f"{env}_FILE": str(file)}
    return environ


def test_a_worker_and_a_command_find_the_servers_by_the_files(platform: Platform, tmp_path: Path) -> None:
    environ = in_files(platform, tmp_path)
    platform.worker("a", pool="threads", **environ)
    done = platform.celery("cluster", "--json", **environ)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["source"], [worker["name"] for worker in seen["workers"]]) == ("ledger", ["a"])


def test_a_wrong_file_is_a_message_that_names_it_and_no_traceback(platform: Platform, tmp_path: Path) -> None:
    environ = in_files(platform, tmp_path)
    Path(environ["REDIS_URL_FILE"]).write_text("s3cret")
    done = platform.celery("cluster", **environ)
    assert done.returncode == 78
    assert f"REDIS_URL_FILE={environ['REDIS_URL_FILE']} does not hold one URL" in done.stderr
    assert "Traceback" not in done.stderr
    assert "s3cret" not in done.stderr + done.stdout


@pytest.mark.long
def test_up_puts_no_url_from_a_file_into_the_environment_of_what_it_starts(platform: Platform, tmp_path: Path) -> None:
    arguments = ("up", "--json", "--worker", "a=2", "--pool", "threads")
    environ = {**in_files(platform, tmp_path), "PLATFORM_DASHBOARD": "127.0.0.1:0"}
    running = platform.start("up", *arguments, says='"workers"', **environ)
    started = json.loads(running.wait_for('"workers"'))
    pids = [started["workers"][0]["pid"], started["beat"]["pid"], started["dashboard"]["pid"]]
    for pid in pids:
        seen = psutil.Process(pid).environ()
        assert seen["REDIS_URL_FILE"] == environ["REDIS_URL_FILE"]
        assert [env for env in FROM_FILES if seen.get(env)] == []
    assert running.stop() == 0


@pytest.mark.long
def test_a_demo_on_servers_of_its_own_is_led_to_no_broker_by_a_file(platform: Platform, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("submit,run,cpus\n0,1,1\n")
    broker = tmp_path / "broker"
    broker.write_text("redis://127.0.0.1:1/0")
    environ: dict[str, Any] = {"REDIS_URL": "", "DATABASE_URL": "", "CELERY_BROKER_URL_FILE": str(broker)}
    done = platform.celery("demo", "--trace", str(trace), "--scale", "4", "--worker=a=1", "--json", **environ)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["states"] == {"succeeded": 1}
