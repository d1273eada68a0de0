"""The units of deploy/systemd: systemd understands them, all names in them exist, and their steps end a real worker."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from tests.fixtures import deployed
from tests.fixtures import tasks as held
from tests.fixtures.processes import READY, ROOT, Platform, Process
from tests.fixtures.submitting import Submitter

UNITS: Final = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
WORKER: Final = ROOT / "deploy" / "systemd" / "celery-capacity-worker.service"
PROGRAM: Final = "/opt/celery-capacity/bin/celery"

#: Section in which systemd has each directive (systemd.unit(5), systemd.service(5), systemd.exec(5), systemd.kill(5)).
DIRECTIVES: Final = {
    "Unit": {"Description", "Documentation", "Wants", "Requires", "After", "StartLimitIntervalSec", "StartLimitBurst"},
    "Service": {
        *("Type", "ExecStart", "ExecStartPre", "ExecStop", "ExecReload", "Restart", "RestartSec", "TimeoutStopSec"),
        *("TimeoutStartSec", "OOMPolicy", "KillSignal", "KillMode", "FinalKillSignal", "SuccessExitStatus"),
        *("User", "Group", "DynamicUser", "WorkingDirectory", "StateDirectory", "UMask", "ReadWritePaths"),
        *("Environment", "EnvironmentFile", "LoadCredential", "CPUQuota", "MemoryMax", "TasksMax"),
        *("NoNewPrivileges", "CapabilityBoundingSet", "AmbientCapabilities", "LockPersonality"),
        *("MemoryDenyWriteExecute", "PrivateDevices", "PrivateTmp", "ProtectClock", "ProtectControlGroups"),
        *("ProtectHome", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables"),
        *("ProtectSystem", "RestrictAddressFamilies", "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID"),
        *("SystemCallArchitectures", "SystemCallErrorNumber", "SystemCallFilter"),
    },
    "Install": {"WantedBy"},
}

#: Most exposure that `systemd-analyze security` may report, of 100: "OK" begins below 50.
MOST_EXPOSED: Final = 30

Directives = list[tuple[str, str, str]]


def directives(unit: Path) -> Directives:
    """Return (section, name, value) of each directive of a unit."""
    rows, section = [], ""
    for line in unit.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line.strip() and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            rows.append((section, name, value))
    return rows


def values(unit: Path, name: str) -> list[str]:
    return [value for _, directive, value in directives(unit) if directive == name]


def environment(unit: Path) -> dict[str, str]:
    words = [word for line in values(unit, "Environment") for word in shlex.split(line)]
    return dict(word.split("=", 1) for word in words)


def complaints(unit: Path) -> list[str]:
    """Return a unit's faults, by systemd itself where it is installed, and by the names of directives."""
    faults = [
        f"{name} is no directive of [{section}]"
        for section, name, _ in directives(unit)
        if name not in DIRECTIVES.get(section, ())
    ]
    analyze = shutil.which("systemd-analyze")
    if analyze is not None:
        done = subprocess.run([analyze, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)
        faults += done.stderr.splitlines()
    return faults


@pytest.fixture
def copied(tmp_path: Path) -> Any:
    """Return a function that copies a unit, and makes it name a program that exists here."""
    program = tmp_path / "celery"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)

    def copy(unit: Path, **replaced: str) -> Path:
        text = unit.read_text(encoding="utf-8").replace(PROGRAM, str(program))
        for old, new in replaced.items():
            assert old in text
            text = text.replace(old, new)
        copy = tmp_path / unit.name
        copy.write_text(text)
        return copy

    return copy


def test_there_is_a_unit_for_a_worker_and_one_for_beat() -> None:
    assert [unit.name for unit in UNITS] == ["celery-capacity-beat.service", "celery-capacity-worker.service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_has_no_complaint(unit: Path, copied: Any) -> None:
    assert complaints(copied(unit)) == []


def test_a_slip_in_a_unit_is_complained_about(copied: Any) -> None:
    assert complaints(copied(WORKER, Restart="Restrat"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_what_a_unit_names_exists(unit: Path) -> None:
    (start,) = values(unit, "ExecStart")
    program, *words = shlex.split(start)
    assert program == PROGRAM
    assert deployed.wrong_command(["celery", *words]) == []
    assert deployed.wrong_settings(environment(unit)) == []


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_urls_come_as_credentials_and_no_secret_stands_in_a_unit(unit: Path) -> None:
    loaded = dict(line.split(":", 1) for line in values(unit, "LoadCredential"))
    read = {value.removeprefix("%d/") for name, value in environment(unit).items() if name.endswith("_FILE")}
    assert read == set(loaded) == {"redis_url", "database_url"}
    assert all(path == f"/etc/celery-capacity/{name}" for name, path in loaded.items())
    pairs = [(name, value) for _, name, value in directives(unit) if name != "LoadCredential"]
    assert deployed.plain_secrets([*pairs, *environment(unit).items()]) == []


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_is_no_root_and_may_do_little(unit: Path, copied: Any) -> None:
    by_name = {name: value for _, name, value in directives(unit)}
    assert by_name["User"] not in ("", "root", "0")
    assert (by_name["NoNewPrivileges"], by_name["ProtectSystem"], by_name["CapabilityBoundingSet"]) == (
        "yes",
        "strict",
        "",
    )
    analyze = shutil.which("systemd-analyze")
    if analyze is not None:
        command = [analyze, "security", "--offline=yes", f"--threshold={MOST_EXPOSED}", "--no-pager", str(copied(unit))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-300:]


def test_beat_writes_where_its_unit_lets_it() -> None:
    by_name = {name: value for _, name, value in directives(WORKER.with_name("celery-capacity-beat.service"))}
    schedule = by_name["ExecStart"].partition("--schedule ")[2]
    assert schedule.startswith(f"/var/lib/{by_name['StateDirectory']}/")


def test_the_how_to_names_files_units_and_settings_that_exist() -> None:
    page = (ROOT / "docs" / "how-to" / "systemd.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    (block_of_settings,) = [block for block in blocks if block.startswith("NODE_NAME")]
    assert deployed.wrong_settings(line.partition("=")[0] for line in block_of_settings.splitlines()) == []
    assert set(re.findall(r"celery-capacity-\w+", page)) == {unit.stem for unit in UNITS}
    for path in [line.split(":", 1)[1] for line in values(WORKER, "LoadCredential")]:
        assert path in page
    (added,) = re.findall(r"```ini\n(.*?)```", page, re.DOTALL)
    names = {line.partition("=")[0] for line in added.splitlines() if "=" in line}
    assert names <= DIRECTIVES["Service"]
    (seconds,) = values(WORKER, "TimeoutStopSec")
    assert f"After {seconds} s more (`TimeoutStopSec`)" in page


# -- the steps of the worker's unit on a real worker


def step(name: str) -> str:
    """Return the value of a directive, without the sign that its failure does not matter."""
    (value,) = values(WORKER, name)
    return value.removeprefix("-")


def stopping(worker: Process, command: str) -> subprocess.Popen[bytes]:
    """Run ExecStop as systemd does, and return its process."""
    return subprocess.Popen(shlex.split(command), env={"MAINPID": str(worker.pid), "PATH": "/usr/bin:/bin"})


@pytest.fixture
def worker(platform: Platform, tmp_path: Path) -> Process:
    """Return the worker that ExecStart starts, with Postgres by the unit's credential.

    The tests' task finds its gate by REDIS_URL.
    """
    credential = tmp_path / environment(WORKER)["DATABASE_URL_FILE"].removeprefix("%d/")
    credential.write_text(platform.environment["DATABASE_URL"] + "\n")
    environ: dict[str, Any] = {"DATABASE_URL_FILE": str(credential), "DATABASE_URL": ""}
    _, *words = shlex.split(step("ExecStart"))
    arguments = words[words.index("platform") + 1 :]
    return platform.start("a", *arguments, says=READY, NODE_NAME="a", PLATFORM_CPUS="2", **environ)


@pytest.mark.long
def test_its_end_waits_for_what_runs(worker: Process, submitter: Submitter, redis_client: redis.Redis) -> None:
    job = submitter.send("tests.fixtures.tasks.hold", "gate")
    held.started(redis_client, "gate")
    stop = stopping(worker, step("ExecStop"))
    worker.wait_for("Warm shutdown")
    assert (worker.alive, stop.poll()) == (True, None)
    held.let_go(redis_client, "gate")
    assert submitter.ended(job).state == "succeeded"
    assert worker.wait() == 0
    assert stop.wait(30) == 0


@pytest.mark.long
def test_what_outlasts_the_warm_end_is_handed_back_by_the_cold_one(
    worker: Process, submitter: Submitter, redis_client: redis.Redis, platform: Platform
) -> None:
    job = submitter.send("tests.fixtures.tasks.hold", "gate")
    held.started(redis_client, "gate")
    warm = step("ExecStop")
    assert " 600 " in warm
    stop = stopping(worker, warm.replace(" 600 ", " 1 "))
    assert stop.wait(30) == 124, "timeout(1) says that it was over"
    assert worker.alive
    worker.signal(signal.Signals[step("KillSignal")])
    worker.wait()
    platform.worker("b", cpus=2, pool="threads")
    held.started(redis_client, "gate")
    held.let_go(redis_client, "gate")
    assert submitter.ended(job).state == "succeeded"
    assert submitter.outcomes(job) == ["handed_back", "succeeded"]


def test_the_cold_end_comes_before_the_kill() -> None:
    waits = int(re.search(r"timeout (\d+)", step("ExecStop")).group(1))  # type: ignore[union-attr]
    assert waits < int(step("TimeoutStopSec"))
    assert (step("KillMode"), step("KillSignal")) == ("mixed", "SIGQUIT")
