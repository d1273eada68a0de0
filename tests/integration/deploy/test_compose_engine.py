"""docker-compose.yml on a real engine (`make test-docker`): it comes up, works, grows by a worker, and goes.

The ports of the file, 8000 and 5555, must be free on this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.fixtures.processes import ROOT
from tests.fixtures.waiting import until

pytestmark = [pytest.mark.docker, pytest.mark.long]

#: A project name of its own, so that nobody's volumes are removed.
PROJECT: Final = f"celery-capacity-test-{os.getpid()}"

#: Seconds for the pull of the images, the build and the start, on a slow line.
BUILDING: Final = 1200
#: Seconds for a command in a container.
ANSWERING: Final = 120

#: Five jobs of one CPU that wait for each other, so they need more than one worker of the file.
SUBMIT: Final = """
from celery_capacity import create_app
app = create_app()
jobs = [app.send_task("demo.sleep", args=[2.0], cpus=1) for _ in range(5)]
print(*sorted({job.get(timeout=60)["worker"] for job in jobs}))
"""


def compose(*arguments: str, given: str = "", seconds: float = ANSWERING) -> str:
    done = subprocess.run(
        ["docker", "compose", "--project-name", PROJECT, *arguments],
        cwd=ROOT,
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    assert done.returncode == 0, f"docker compose {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    subprocess.run([str(ROOT / "deploy" / "make-secrets")], check=True)
    try:
        compose("up", "--build", "--detach", "--wait", seconds=BUILDING)
        yield
    finally:
        compose("down", "--volumes", "--timeout", "60", seconds=BUILDING)
    assert compose("ps", "--all", "--quiet") == ""


def containers() -> dict[str, dict[str, Any]]:
    """Return the engine's description of each container, by the name of its service."""
    lines = compose("ps", "--all", "--format", "json").splitlines()
    return {container["Service"]: container for container in map(json.loads, lines)}


def workers() -> list[str]:
    seen = json.loads(compose("exec", "-T", "dashboard", "celery", "-A", "platform", "cluster", "--json"))
    return [worker["name"] for worker in seen["workers"]]


def test_all_services_are_healthy_and_the_migrations_are_done(cluster: None) -> None:
    by_service = containers()
    assert (by_service["migrations"]["State"], by_service["migrations"]["ExitCode"]) == ("exited", 0)
    stay = {"redis", "postgres", "worker-01", "worker-02", "beat", "flower", "dashboard"}
    assert {name: by_service[name]["Health"] for name in stay} == dict.fromkeys(stay, "healthy")
    assert workers() == ["worker-01", "worker-02"]


def test_pages_answer_on_this_machine(cluster: None) -> None:
    for url in ("http://127.0.0.1:8000/api/v1/dashboard", "http://127.0.0.1:5555/healthcheck"):
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.status == 200


def test_no_process_is_root_and_no_password_is_in_an_environment(cluster: None) -> None:
    for service in ("worker-01", "beat", "dashboard"):
        assert compose("exec", "-T", service, "id", "-u").strip() == "10001"
        assert "://" not in compose("exec", "-T", service, "env")


def test_jobs_run_and_one_more_worker_takes_its_part(cluster: None) -> None:
    assert set(compose("exec", "-T", "worker-01", "python", "-", given=SUBMIT).split()) == {"worker-01", "worker-02"}
    compose("up", "--detach", "--wait", "--scale", "worker=1", seconds=BUILDING)
    added = set(workers()) - {"worker-01", "worker-02"}
    assert len(added) == 1
    assert added < set(compose("exec", "-T", "worker-01", "python", "-", given=SUBMIT).split())
    compose("up", "--detach", "--wait", "--scale", "worker=0", seconds=BUILDING)
    until(lambda: workers() == ["worker-01", "worker-02"], "the worker that went is not in the cluster", 90)
