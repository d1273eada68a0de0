"""docker-compose.yml on a real engine (`make test-docker`): it comes up, works, grows by a worker, and goes.

DASHBOARD_PORT and FLOWER_PORT name other ports than 8000 and 5555, if these are taken on this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.fixtures.processes.platforms import ROOT
from tests.fixtures.waiting import until

pytestmark = [pytest.mark.docker, pytest.mark.long]

#: A project name of its own, so that nobody's volumes are removed.
PROJECT: Final = f"celery-capacity-test-{os.getpid()}"

#: Seconds for the pull of the images, the build and the start, on a slow line.
BUILDING: Final = 1200
#: Seconds for a command in a container.
ANSWERING: Final = 120

#: Seconds that jobs have when their worker stops.
GRACE: Final = 5

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
        env={**os.environ, "SHUTDOWN_GRACE": str(GRACE)},
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


def described() -> list[dict[str, Any]]:
    """Return the workers of the cluster."""
    seen = json.loads(compose("exec", "-T", "dashboard", "celery", "-A", "platform", "cluster", "--json"))
    return list(seen["workers"])


def workers() -> list[str]:
    return [worker["name"] for worker in described()]


def jobs() -> list[dict[str, Any]]:
    return list(json.loads(compose("exec", "-T", "dashboard", "celery", "-A", "platform", "jobs", "--json")))


def test_all_services_are_healthy_and_the_migrations_are_done(cluster: None) -> None:
    by_service = containers()
    assert (by_service["migrations"]["State"], by_service["migrations"]["ExitCode"]) == ("exited", 0)
    stay = {"redis", "postgres", "worker-01", "worker-02", "beat", "flower", "dashboard"}
    assert {name: by_service[name]["Health"] for name in stay} == dict.fromkeys(stay, "healthy")
    assert workers() == ["worker-01", "worker-02"]


def test_pages_answer_on_this_machine(cluster: None) -> None:
    dashboard, flower = os.environ.get("DASHBOARD_PORT") or "8000", os.environ.get("FLOWER_PORT") or "5555"
    for url in (f"http://127.0.0.1:{dashboard}/api/v1/dashboard", f"http://127.0.0.1:{flower}/healthcheck"):
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.status == 200
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{flower}/workers", timeout=10)


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
    # Without --scale: back to WORKERS, which is 0.
    compose("up", "--detach", "--wait", seconds=BUILDING)
    until(lambda: workers() == ["worker-01", "worker-02"], "the worker that went is not in the cluster", 90)


def test_orphans_are_buried_and_a_worker_publishes_its_limits(cluster: None) -> None:
    assert compose("exec", "-T", "worker-01", "cat", "/proc/1/comm").strip() == "tini"
    (worker,) = [worker for worker in described() if worker["name"] == "worker-01"]
    assert worker["cpus"] == 2
    # 2 GiB, less 128 MiB and 32 MiB for each of two processes.
    assert worker["memory"] == 2 * 2**30 - 192 * 2**20


def test_no_command_is_refused_to_the_user_of_a_part(cluster: None) -> None:
    """CONFIG is excepted: a worker tries it, to learn the eviction policy."""
    script = """REDISCLI_AUTH="$(sed -n 's/^user admin on >\\([^ ]*\\).*/\\1/p' /run/secrets/redis_acl)" """
    refused = compose("exec", "-T", "redis", "sh", "-c", f"{script} redis-cli --user admin --json acl log 100")
    assert [entry for entry in json.loads(refused) if "config" not in str(entry["object"])] == []


def test_killed_container_takes_its_jobs_back_at_once(cluster: None) -> None:
    """Without the lock it would wait for the rest of its lease, 50 s at least."""
    submit = SUBMIT.partition("print")[0].replace("2.0", "60.0").replace("range(5)", "range(4)")
    ids = compose("exec", "-T", "worker-02", "python", "-", given=f"{submit}\nprint(*(job.id for job in jobs))").split()
    until(lambda: [job["state"] for job in jobs() if job["id"] in ids] == ["running"] * 4, "all run")
    pid = subprocess.run(
        ["docker", "inspect", "--format", "{{.State.Pid}}", f"{PROJECT}-worker-01-1"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # `docker kill` would count as a wish of the user's, and the engine would not start the container again.
    image = ["--privileged", "--pid", "host", "--user", "0", "--entrypoint", "sh", "celery-capacity"]
    subprocess.run(["docker", "run", "--rm", *image, "-c", f"kill -9 {pid}"], check=True, timeout=ANSWERING)
    until(lambda: {job["attempt"] for job in jobs() if job["id"] in ids} == {1, 2}, "its jobs run again", 40)
    until(lambda: {job["state"] for job in jobs() if job["id"] in ids} == {"succeeded"}, "all have ended", 180)


def test_job_that_outlasts_the_grace_goes_on_elsewhere(cluster: None) -> None:
    submit = """
from celery_capacity import create_app
app = create_app()
print(*(app.send_task("demo.sleep", args=[100.0], cpus=2).id for _ in range(2)))
"""
    ids = compose("exec", "-T", "worker-01", "python", "-", given=submit).split()
    until(lambda: [job["state"] for job in jobs() if job["id"] in ids] == ["running"] * 2, "both run")
    compose("stop", "worker-01")
    assert containers()["worker-01"]["ExitCode"] == 0
    until(lambda: {job["state"] for job in jobs() if job["id"] in ids} == {"succeeded"}, "both have ended", 300)
    assert sorted(job["attempt"] for job in jobs() if job["id"] in ids) == [1, 2]
    compose("up", "--detach", "--wait", seconds=BUILDING)
