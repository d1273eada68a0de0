"""The manifests of deploy/kubernetes: Kubernetes understands them, and all names in them exist.

Their probes have the documented effect on a real worker.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import kubernetes_validate
import pytest
import yaml
from sqlalchemy import text

from celery_capacity.routing.config.machine import needed_by_worker
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.documents import deployed
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import ROOT, Platform
from tests.fixtures.waiting import until

FOLDER: Final = ROOT / "deploy" / "kubernetes"
PAGE: Final = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text(encoding="utf-8")
KUSTOMIZATION: Final = FOLDER / "kustomization.yaml"
MANIFESTS: Final = {path.stem: path for path in sorted(FOLDER.glob("*.yaml")) if path != KUSTOMIZATION}
KEDA: Final = FOLDER / "autoscale" / "keda.yaml"
#: Manifests with pods.
WITH_PODS: Final = ("beat", "dashboard", "migrate", "worker")

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


each = pytest.mark.parametrize("name", WITH_PODS)
every = pytest.mark.parametrize("name", sorted(MANIFESTS))


def test_there_are_workers_beat_migrations_and_a_dashboard() -> None:
    kinds = {name: manifest(name)["kind"] for name in MANIFESTS}
    with_pods = {"beat": "Deployment", "dashboard": "Deployment", "migrate": "Job", "worker": "Deployment"}
    assert kinds == {**with_pods, "disruption": "PodDisruptionBudget", "network": "NetworkPolicy"}


def test_one_file_names_the_image_and_all_others() -> None:
    kustomization = yaml.safe_load(KUSTOMIZATION.read_text(encoding="utf-8"))
    assert sorted(kustomization["resources"]) == sorted(path.name for path in MANIFESTS.values())
    (image,) = kustomization["images"]
    assert {container(name)["image"] for name in WITH_PODS} == {image["name"]}
    assert isinstance(image["newTag"], str)


@each
def test_shared_parts_of_the_files_are_equal(name: str) -> None:
    """Each file stands alone, so what they share is in all of them."""
    assert pod(name)["securityContext"] == pod("worker")["securityContext"]
    assert container(name)["securityContext"] == container("worker")["securityContext"]
    urls = {key: value for key, value in environment("worker").items() if key.endswith("_URL_FILE")}
    assert urls.items() <= environment(name).items()
    # A folder in memory or on the node's disk that fills must not take the node with it.
    for volume in pod(name)["volumes"]:
        assert "secret" in volume or volume["emptyDir"]["sizeLimit"]
    resources = container(name)["resources"]
    assert resources["limits"]["ephemeral-storage"] == resources["requests"]["ephemeral-storage"]


@pytest.mark.parametrize("version", VERSIONS)
@every
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
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
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
    assert spec["activeDeadlineSeconds"] <= 900
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [Exit.CONFIGURATION])
    assert rule["onExitCodes"]["containerName"] == container("migrate")["name"]


def test_the_dashboard_listens_inside_its_pod_only() -> None:
    assert environment("dashboard")["PLATFORM_DASHBOARD"] == "127.0.0.1:8000"
    assert "ports" not in container("dashboard")


def test_a_worker_publishes_the_limits_of_its_container() -> None:
    """The worker reads its cgroup. A setting would publish the whole limit, of which the worker takes its part."""
    assert not {"PLATFORM_CPUS", "PLATFORM_MEMORY"} & set(environment("worker"))
    resources = container("worker")["resources"]
    assert resources["limits"] == resources["requests"]
    assert quantity(resources["limits"]["memory"]) > needed_by_worker(int(resources["limits"]["cpu"]))
    assert environment("worker")["NODE_NAME"] == {"fieldRef": {"fieldPath": "metadata.name"}}


def test_a_new_version_leaves_the_number_of_workers_as_it_is() -> None:
    assert "replicas" not in manifest("worker")["spec"]
    assert manifest("worker")["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 1}


def test_workers_are_spread_and_drained_one_after_the_other() -> None:
    labels = manifest("worker")["spec"]["selector"]["matchLabels"]
    (spread,) = pod("worker")["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["labelSelector"]["matchLabels"]) == ("kubernetes.io/hostname", labels)
    budget = manifest("disruption")["spec"]
    assert (budget["maxUnavailable"], budget["selector"]["matchLabels"]) == (1, labels)


def test_nobody_connects_to_a_pod() -> None:
    spec = manifest("network")["spec"]
    assert (spec["policyTypes"], spec["ingress"]) == (["Ingress"], [])
    for name in WITH_PODS:
        labels = manifest(name)["spec"]["template"]["metadata"]["labels"]
        assert spec["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_files_of_a_worker_are_in_volumes_that_outlive_its_container() -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in container("worker")["volumeMounts"]}
    for variable in ("PLATFORM_HEALTH_DIR", "PLATFORM_LOCK_DIR"):
        assert str(Path(environment("worker")[variable]).parent) in mounts


def test_the_autoscaler_asks_for_as_many_workers_as_the_jobs_need(submitter: Submitter, platform: Platform) -> None:
    authentication, scaled = yaml.safe_load_all(KEDA.read_text(encoding="utf-8"))
    assert scaled["spec"]["scaleTargetRef"]["name"] == manifest("worker")["metadata"]["name"]
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    (reference,) = authentication["spec"]["secretTargetRef"]
    assert (reference["name"], reference["key"]) == ("celery-capacity", "database_url")
    query = trigger["metadata"]["query"]
    # A whole worker for each of its CPUs' worth of jobs.
    assert f"/ {quantity(container('worker')['resources']['limits']['cpu']):g})" in query

    def wanted() -> int:
        with platform.engine.connect() as connection:
            return int(connection.execute(text(query)).scalar_one())

    assert wanted() == 0
    jobs = [submitter.send("tests.fixtures.tasks.add", 1, 2, cpus=cpus) for cpus in (4, 4, 0.5)]
    assert wanted() == 3
    platform.worker("a", cpus=4, pool="threads")
    assert [submitter.ended(job).state for job in jobs] == ["succeeded"] * 3
    assert wanted() == 0


def test_there_is_time_for_the_warm_end_and_then_for_the_cold_one() -> None:
    grace, kill = int(environment("worker")["PLATFORM_SHUTDOWN_GRACE"]), pod("worker")["terminationGracePeriodSeconds"]
    assert grace + 30 <= kill
    assert f"`terminationGracePeriodSeconds` ({kill}," in PAGE
    assert "lifecycle" not in container("worker"), "TERM alone is enough"


def test_the_how_to_applies_every_file() -> None:
    assert "kubectl apply -k deploy/kubernetes\n" in PAGE
    assert "kubectl apply -k deploy/kubernetes -l app.kubernetes.io/component=migrate" in PAGE
    assert manifest("migrate")["metadata"]["labels"]["app.kubernetes.io/component"] == "migrate"
    for path in re.findall(r"deploy/kubernetes/[\w./-]+\.yaml", PAGE):
        assert (ROOT / path).is_file(), path
    names = set(re.findall(r"(?:job/|job |deploy/)(celery-capacity-\w+)", PAGE))
    assert names <= {manifest(name)["metadata"]["name"] for name in MANIFESTS}


# -- probes on a real worker


def probe(kind: str, folder: Path) -> int:
    """Return the exit code of a probe of the worker, with this folder for that of its health."""
    words = [word.replace("/tmp/health", str(folder)) for word in container("worker")[kind]["exec"]["command"]]
    return subprocess.run(words, env={"PATH": "/usr/bin:/bin"}, check=False, capture_output=True, timeout=60).returncode


@pytest.mark.long
def test_worker_is_ready_and_alive_until_it_ends(platform: Platform, tmp_path: Path) -> None:
    folder = tmp_path / "health"
    kinds = ("startupProbe", "readinessProbe", "livenessProbe")
    assert [probe(kind, folder) for kind in kinds] == [1, 1, 1]
    worker = platform.worker("a", pool="threads", PLATFORM_HEALTH_DIR=str(folder))
    until(lambda: [probe(kind, folder) for kind in kinds] == [0, 0, 0], "it is ready")
    assert worker.stop() == 0
    assert [probe(kind, folder) for kind in kinds] == [1, 1, 1]


def test_old_files_are_no_health(tmp_path: Path) -> None:
    for name in ("ready", "live"):
        (tmp_path / name).touch()
    assert (probe("readinessProbe", tmp_path), probe("livenessProbe", tmp_path)) == (0, 0)
    two_minutes_ago = time.time() - 120
    for name in ("ready", "live"):
        os.utime(tmp_path / name, (two_minutes_ago, two_minutes_ago))
    assert (probe("readinessProbe", tmp_path), probe("livenessProbe", tmp_path)) == (1, 0)
    os.utime(tmp_path / "live", (two_minutes_ago - 120, two_minutes_ago - 120))
    assert probe("livenessProbe", tmp_path) == 1
