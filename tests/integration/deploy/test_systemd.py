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

from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures import tasks as held
from tests.fixtures.documents import deployed
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import READY, ROOT, Platform, Process

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
        *("NotifyAccess", "WatchdogSec", "RestartPreventExitStatus", "LimitNOFILE", "ProtectProc", "RemoveIPC"),
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


def test_there_is_a_unit_for_each_part() -> None:
    parts = ("beat", "dashboard", "worker", "worker@")
    assert [unit.name for unit in UNITS] == [f"celery-capacity-{part}.service" for part in parts]


def test_one_of_several_workers_is_as_a_single_one_but_for_its_name() -> None:
    several = directives(WORKER.with_name("celery-capacity-worker@.service"))
    for_each = [
        ("Unit", "Description", "celery-capacity worker %i"),
        ("Service", "Environment", "NODE_NAME=%i"),
        ("Service", "EnvironmentFile", "-/etc/celery-capacity/worker-%i.env"),
    ]
    single = [row for row in directives(WORKER) if row[1] != "Description"]
    assert [row for row in several if row not in for_each] == single


def test_what_no_restart_changes_is_not_started_again() -> None:
    for unit in UNITS:
        codes = {int(code) for line in values(unit, "RestartPreventExitStatus") for code in line.split()}
        # For a worker 69 means that its name is taken; for others that a store is away, and may come.
        wanted = {Exit.CONFIGURATION, Exit.UNAVAILABLE} if "worker" in unit.name else {Exit.CONFIGURATION}
        assert codes == wanted, unit.name


def test_watchdog_is_slower_than_heartbeats_and_the_worker_tells_of_itself() -> None:
    (watchdog,) = values(WORKER, "WatchdogSec")
    # A store that is silent may hold up a heartbeat for several of its time-outs.
    assert int(watchdog) >= 2 * Settings().renew_interval + 5 * Settings().store_timeout
    assert (values(WORKER, "Type"), values(WORKER, "NotifyAccess")) == (["notify"], ["main"])
    # It waits for its stores for as long as they are away.
    assert values(WORKER, "TimeoutStartSec") == ["infinity"]


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
    assert {name.rstrip("@") for name in re.findall(r"celery-capacity-\w+@?", page)} == {
        unit.stem.rstrip("@") for unit in UNITS
    }
    assert "celery-capacity-worker@" in page
    for path in [line.split(":", 1)[1] for line in values(WORKER, "LoadCredential")]:
        assert path in page
    (added,) = re.findall(r"```ini\n(.*?)```", page, re.DOTALL)
    names = {line.partition("=")[0] for line in added.splitlines() if "=" in line}
    assert names <= DIRECTIVES["Service"]
    (seconds,) = values(WORKER, "TimeoutStopSec")
    assert f"after {seconds} s (`TimeoutStopSec`)" in page


# -- the steps of the worker's unit on a real worker


def step(name: str) -> str:
    """Return the value of a directive."""
    (value,) = values(WORKER, name)
    return value


@pytest.fixture
def worker(platform: Platform, tmp_path: Path) -> Process:
    """Return the worker that ExecStart starts, with Postgres by the unit's credential.

    The tests' task finds its gate by REDIS_URL.
    """
    credential = tmp_path / environment(WORKER)["DATABASE_URL_FILE"].removeprefix("%d/")
    credential.write_text(platform.environment["DATABASE_URL"] + "\n")
    grace = environment(WORKER)["PLATFORM_SHUTDOWN_GRACE"]
    environ: dict[str, Any] = {
        "DATABASE_URL_FILE": str(credential),
        "DATABASE_URL": "",
        "PLATFORM_SHUTDOWN_GRACE": grace,
    }
    _, *words = shlex.split(step("ExecStart"))
    arguments = words[words.index("platform") + 1 :]
    return platform.start("a", *arguments, says=READY, NODE_NAME="a", PLATFORM_CPUS="2", **environ)


@pytest.mark.long
def test_its_end_waits_for_what_runs(worker: Process, submitter: Submitter, redis_client: redis.Redis) -> None:
    job = submitter.send("tests.fixtures.tasks.hold", "gate")
    held.started(redis_client, "gate")
    worker.signal(signal.SIGTERM)
    worker.wait_for("Warm shutdown")
    assert worker.alive
    held.let_go(redis_client, "gate")
    assert submitter.ended(job).state == "succeeded"
    assert worker.wait() == 0


def test_the_cold_end_comes_before_the_kill() -> None:
    grace = float(environment(WORKER)["PLATFORM_SHUTDOWN_GRACE"])
    assert grace + 30 <= int(step("TimeoutStopSec"))
    # TERM, to the worker alone.
    assert (step("KillMode"), values(WORKER, "KillSignal"), values(WORKER, "ExecStop")) == ("mixed", [], [])
