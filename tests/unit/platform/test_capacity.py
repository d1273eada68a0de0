"""The script `capacity`: its help, what it hands to Celery, and what it imports."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner

from celery_capacity.platform.capacity import CELERY, capacity
from celery_capacity.workers.plugin import COMMANDS
from tests.fixtures.processes.forking import usual_environment

#: Servers that are not there.
NOWHERE = {"REDIS_URL": "redis://127.0.0.1:1/0", "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}
SCRIPT = str(Path(sys.executable).with_name("capacity"))
#: Commands whose help may import more: what they start, or simulate, is built on all of it.
LARGE = {"db", "demo", "simulate", "up", "whatif"}
SLOW = {"celery", "kombu", "redis", "sqlalchemy", "psycopg2", "tornado", "alembic"}


def run(*arguments: str, folder: Path = Path("/"), **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments],
        cwd=folder,
        env={**usual_environment(), **NOWHERE, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def loaded_by(code: str) -> set[str]:
    """Return the slow packages that are imported once this code has run."""
    lines = (
        "import sys",
        "from click.testing import CliRunner",
        "from celery_capacity.platform.capacity import capacity",
        code,
        f"print(*({SLOW} & set(sys.modules)))",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**usual_environment(), **NOWHERE},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(done.stdout.split())


def test_script_is_installed() -> None:
    (point,) = [point for point in entry_points(group="console_scripts") if point.name == "capacity"]
    assert point.value == "celery_capacity.platform.script:main"


def test_help_lists_commands_under_headings() -> None:
    text = CliRunner().invoke(capacity, ["--help"]).output
    headings = ["Start:", "Look:", "Maintain:", "Celery's commands:", "Examples:"]
    places = [text.index(f"\n{heading}\n") for heading in headings]
    assert places == sorted(places)
    for command in COMMANDS:
        assert f"\n  {command.name} " in text[: text.index("Celery's commands:")]


def test_help_lists_all_commands_of_celery_and_no_other() -> None:
    from celery.bin.celery import celery

    assert set(CELERY) == set(celery.commands) - {command.name for command in COMMANDS}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["no-such-command"]])
def test_group_imports_no_store_and_no_celery(arguments: list[str]) -> None:
    assert loaded_by(f"CliRunner().invoke(capacity, {arguments})") == set()


@pytest.mark.parametrize("name", sorted({str(command.name) for command in COMMANDS} - LARGE))
def test_help_of_a_command_imports_no_store_and_no_celery(name: str) -> None:
    assert loaded_by(f"assert 'Usage' in CliRunner().invoke(capacity, ['{name}', '--help']).output") == set()


def test_jobs_imports_no_celery_when_it_runs() -> None:
    loaded = loaded_by("assert CliRunner().invoke(capacity, ['jobs']).exit_code == 69")
    assert "sqlalchemy" in loaded
    assert not {"celery", "kombu", "tornado"} & loaded


def test_usage_and_examples_are_as_typed() -> None:
    done = run("jobs", "--help")
    assert done.stdout.startswith("Usage: capacity jobs [OPTIONS]\n")
    assert "\n    capacity jobs\n" in done.stdout
    assert "celery -A platform" not in done.stdout


def test_unknown_command_gets_advice() -> None:
    done = run("job5")
    assert done.returncode == 2
    assert "There is no command 'job5'. Did you mean job or jobs?" in done.stderr


def test_command_of_celery_is_handed_over(tmp_path: Path) -> None:
    done = run("report", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "celery:5.7" in done.stdout
    assert run("worker", "--help").stdout.startswith("Usage: capacity worker [OPTIONS]\n")


def test_app_is_chosen_by_option_and_by_environment(tmp_path: Path) -> None:
    (tmp_path / "proj.py").write_text("from celery import Celery\napp = Celery('theirs')\n")
    done = run("-A", "proj", "jobs", folder=tmp_path)
    assert done.returncode == 2
    assert "the app 'theirs' is not on the platform" in done.stderr
    assert run("--workdir", str(tmp_path), "-A", "proj", "jobs").stderr == done.stderr
    assert run("jobs", folder=tmp_path, CELERY_APP="proj").stderr == done.stderr
    assert run("-A", "proj", "jobs", "--help", folder=tmp_path).stdout.startswith(
        "Usage: capacity -A proj jobs [OPTIONS]\n"
    )
    assert "Unable to load celery application" in run("-A", "nowhere", "jobs", folder=tmp_path).stderr


def test_installed_app_answers_through_the_script(tmp_path: Path) -> None:
    code = "from celery import Celery\nimport celery_capacity\napp = celery_capacity.install(Celery('theirs'))\n"
    (tmp_path / "proj.py").write_text(code)
    done = run("-A", "proj", "jobs", folder=tmp_path)
    assert done.returncode == 69
    assert "Postgres" in done.stderr


def test_multi_starts_workers_of_the_app(tmp_path: Path) -> None:
    (tmp_path / "proj.py").write_text("from celery import Celery\napp = Celery('theirs')\n")
    done = run("-A", "proj", "multi", "show", "w1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "-A proj" in done.stdout + done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_is_offered(shell: str) -> None:
    source = subprocess.run(
        [SCRIPT],
        env={**usual_environment(), "_CAPACITY_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "_CAPACITY_COMPLETE" in source.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [("capacity clu", "cluster"), ("capacity jobs --state fa", "failed"), ("capacity worker --autos", "--autoscale")],
)
def test_shell_completion_completes(words: str, expected: str) -> None:
    typed = words.split()
    done = subprocess.run(
        [SCRIPT],
        env={
            **usual_environment(),
            "_CAPACITY_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(typed) - 1),
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert f"plain,{expected}" in done.stdout.split()


def test_shell_completion_of_celery_completes_our_commands() -> None:
    words = "celery -A platform tail --ta"
    done = subprocess.run(
        [str(Path(sys.executable).with_name("celery"))],
        env={**usual_environment(), "_CELERY_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "4"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "plain,--task" in done.stdout.split()
