"""The manifests of deploy/kubernetes: Kubernetes understands them, and all names in them exist.

Their probes and hooks have the documented effect on a real worker.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Final

import kubernetes_validate
import pytest
import redis
import yaml

from celery_capacity.routing.config.settings import Settings
from tests.fixtures import deployed
from tests.fixtures import tasks as held
from tests.fixtures.composed import programs, with_path
from tests.fixtures.processes import ROOT, Platform, Process
from tests.fixtures.submitting import Submitter

FOLDER: Final = ROOT / "deploy" / "kubernetes"
PAGE: Final = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text(encoding="utf-8")
MANIFESTS: Final = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}

#: Versions of Kubernetes whose schemas the manifests must match.
VERSIONS: Final = ("1.28", "1.37")

#: Factor of each unit suffix of a quantity.
FACTORS: Final = {"m": 1e-3, "": 1.0, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}

#: User and group of the image, as in the Dockerfile.
USER: Final = 10001


def manifest(name: str) -> dict[str, Any]:
    (document,) = yaml.safe_load_all(MANIFESTS[name].read_text(encoding="utf-8"))
    return dict(document)


def pod(name: str) -> dict[str, Any]:
    return dict(manifest(name)["spec"]["template"]["spec"])


def container(name: str) -> dict[str, Any]:
    (only,) = pod(name)["containers"]
    return dict(only)


def environment(name: str) -> dict[str, Any]:
    """Return the text of each variable, or its source, by the variable's name."""
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container(name)["env"]}


def quantity(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)(\w*)", text)
    assert match is not None
    return float(match[1]) * FACTORS[match[2]]


each = pytest.mark.parametrize("name", sorted(MANIFESTS))


def test_there_are_workers_beat_migrations_and_a_dashboard() -> None:
    kinds = {name: manifest(name)["kind"] for name in MANIFESTS}
    assert kinds == {"beat": "Deployment", "dashboard": "Deployment", "migrate": "Job", "worker": "Deployment"}


@pytest.mark.parametrize("version", VERSIONS)
@each
def test_a_manifest_keeps_to_the_schemas(name: str, version: str) -> None:
    assert kubernetes_validate.validate(manifest(name), version, strict=True) == version
    assert f" {version} " in " ".join(PAGE.split())


def test_a_slip_in_a_manifest_is_refused() -> None:
    wrong = manifest("worker")
    wrong["spec"]["template"]["spec"]["terminationGraceSeconds"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@each
def test_each_command_and_setting_exists(name: str) -> None:
    assert "command" not in container(name), "the image's entrypoint is `celery -A platform`"
    assert deployed.wrong_command(container(name)["args"]) == []
    assert deployed.wrong_settings(environment(name)) == []
    for kind in ("readinessProbe", "livenessProbe"):
        words = container(name).get(kind, {}).get("exec", {}).get("command", [])
        called = re.search(r"celery -A platform [^|]*", " ".join(words))
        if called is not None:
            assert deployed.wrong_command(called[0].replace('"', "").split()) == []


@each
def test_the_urls_are_a_mounted_secret_and_nothing_stands_in_plain_text(name: str) -> None:
    assert deployed.plain_secrets(deployed.leaves(manifest(name))) == []
    assert deployed.plain_secrets((k, v) for k, v in environment(name).items() if isinstance(v, str)) == []
    mounts = {mount["name"]: mount for mount in container(name)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod(name)["volumes"]}
    assert set(mounts) == set(volumes)
    secret = volumes["urls"]["secret"]
    made = f"kubectl create secret generic {secret['secretName']} --from-file=redis_url --from-file=database_url"
    assert made in PAGE
    # The pod's group may read the files, and nobody else.
    assert (secret["defaultMode"], pod(name)["securityContext"]["fsGroup"]) == (0o440, USER)
    place = mounts["urls"]["mountPath"]
    files = {key: value for key, value in environment(name).items() if key.endswith("_FILE")}
    assert files == {"REDIS_URL_FILE": f"{place}/redis_url", "DATABASE_URL_FILE": f"{place}/database_url"}


@each
def test_a_pod_is_no_root_and_may_do_little(name: str) -> None:
    security = pod(name)["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"], security["runAsGroup"]) == (True, USER, USER)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    security_context = container(name)["securityContext"]
    assert security_context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod(name)["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod(name))
    assert container(name)["resources"]["limits"]["memory"]


@each
def test_a_deployment_finds_its_pods(name: str) -> None:
    document = manifest(name)
    if document["kind"] == "Deployment":
        assert document["spec"]["selector"]["matchLabels"] == document["spec"]["template"]["metadata"]["labels"]


def test_beat_is_one_and_never_two_at_once_and_writes_where_it_may() -> None:
    spec = manifest("beat")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    args = container("beat")["args"]
    schedule = args[args.index("--schedule") + 1]
    assert str(Path(schedule).parent) in {mount["mountPath"] for mount in container("beat")["volumeMounts"]}


def test_the_migrations_are_run_to_their_end_and_not_for_ever() -> None:
    spec = manifest("migrate")["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["backoffLimit"] < 10


def test_the_dashboard_listens_inside_its_pod_only() -> None:
    assert environment("dashboard")["PLATFORM_DASHBOARD"] == "127.0.0.1:8000"
    assert "ports" not in container("dashboard")


def test_a_worker_publishes_exactly_what_its_container_may_use() -> None:
    """The texts are made as the kubelet makes them: the limit divided by the divisor, rounded up to a whole number."""
    limits = container("worker")["resources"]["limits"]
    published = {}
    for variable in ("PLATFORM_CPUS", "PLATFORM_MEMORY"):
        source = environment("worker")[variable]["resourceFieldRef"]
        limit = limits[source["resource"].removeprefix("limits.")]
        published[variable] = str(math.ceil(quantity(limit) / quantity(source["divisor"])))
    settings = Settings.from_environ(published)
    assert settings.cpus == quantity(limits["cpu"]) * 1000
    assert settings.memory == quantity(limits["memory"])
    assert environment("worker")["NODE_NAME"] == {"fieldRef": {"fieldPath": "metadata.name"}}


def test_there_is_time_for_the_warm_end_and_then_for_the_cold_one() -> None:
    waits = re.search(r"timeout (\d+)", hook())
    assert waits is not None
    grace = pod("worker")["terminationGracePeriodSeconds"]
    assert int(waits[1]) + 30 <= grace
    assert f"`terminationGracePeriodSeconds` ({grace}," in PAGE


def test_the_how_to_applies_every_file() -> None:
    assert set(re.findall(r"-f deploy/kubernetes/([\w-]+)\.yaml", PAGE)) == set(MANIFESTS)
    names = set(re.findall(r"(?:job/|job |deploy/)(celery-capacity-\w+)", PAGE))
    assert names <= {manifest(name)["metadata"]["name"] for name in MANIFESTS}


# -- probes and hooks on a real worker


def hook() -> str:
    """Return the shell text that preStop runs."""
    shell, option, text = container("worker")["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, option) == ("sh", "-c")
    return str(text)


def probe(kind: str, environ: dict[str, str], **replaced: str) -> int:
    """Return the exit code of a probe of the worker."""
    words = container("worker")[kind]["exec"]["command"]
    for old, new in replaced.items():
        words = [word.replace(old, new) for word in words]
    return subprocess.run(words, env=environ, check=False, capture_output=True, timeout=60).returncode


@pytest.mark.long
def test_worker_is_ready_while_the_ledger_has_it(platform: Platform, tmp_path: Path) -> None:
    environ = {**platform.environment, "NODE_NAME": "a", "PATH": with_path(programs(tmp_path))}
    assert probe("readinessProbe", environ) == 1
    worker = platform.worker("a", pool="threads")
    assert probe("readinessProbe", environ) == 0
    assert probe("readinessProbe", {**environ, "NODE_NAME": "b"}) == 1
    worker.stop()
    assert probe("readinessProbe", environ) == 1


def test_process_is_alive_while_it_runs_and_not_when_stopped_or_dead(tmp_path: Path) -> None:
    def alive() -> bool:
        replaced_paths = {"/proc/1/": f"/proc/{process.pid}/"}
        return probe("livenessProbe", {"PATH": "/usr/bin:/bin"}, **replaced_paths) == 0

    process = Process("sleeper", [shutil.which("sleep") or "sleep", "60"], {}, tmp_path)
    try:
        assert alive()
        process.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert not alive()
        process.signal(signal.SIGCONT)
        os.waitid(os.P_PID, process.pid, os.WCONTINUED)
        assert alive()
    finally:
        process.kill()
    assert not alive()


@pytest.mark.long
def test_what_outlasts_the_warm_end_is_handed_back(
    platform: Platform, submitter: Submitter, redis_client: redis.Redis
) -> None:
    worker = platform.worker("a", cpus=2)
    job = submitter.send("tests.fixtures.tasks.hold", "gate")
    held.started(redis_client, "gate")
    text = hook()
    assert "main=1;" in text
    assert "timeout 600 " in text
    text = text.replace("main=1;", f"main={worker.pid};").replace("timeout 600 ", "timeout 1 ")
    assert subprocess.run(["sh", "-c", text], check=False, timeout=60).returncode == 0
    # The kubelet sends this signal after the hook, whatever the hook did.
    worker.signal(signal.SIGTERM)
    worker.wait()
    platform.worker("b", cpus=2, pool="threads")
    held.started(redis_client, "gate")
    held.let_go(redis_client, "gate")
    assert submitter.ended(job).state == "succeeded"
    assert submitter.outcomes(job) == ["handed_back", "succeeded"]
