"""The name `platform`, the lazy commands, and other people's modules with the names of our folders."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
from click_didyoumean import DYMGroup

from celery_capacity.workers import plugin
from tests.fixtures.processes.forking import usual_environment

#: Servers that are not there. Without them a command would start servers of the user's own, which stay.
NOWHERE = {"REDIS_URL": "redis://127.0.0.1:1/0", "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}


def _python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as started in the folder: with -m and -c the folder comes first in the search for modules."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**usual_environment(), **NOWHERE},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_standard_module_is_what_it_was_and_has_our_folder() -> None:
    assert platform.system()
    assert platform.__file__ is not None
    assert "celery-capacity" not in platform.__file__
    assert str(plugin.FOLDER) in platform.__path__


def test_every_command_is_an_entry_point_that_celery_can_load() -> None:
    points = {point.name: point for point in entry_points(group="celery.commands") if point.module == plugin.__name__}
    assert set(points) == {command.name for command in plugin.COMMANDS}
    for command in plugin.COMMANDS:
        assert points[str(command.name)].load() is command
        assert command.get_short_help_str()
        assert command.load().name == command.name


def test_a_name_that_is_no_command_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'clusters'"):
        plugin.clusters  # noqa: B018


def test_help_of_celery_has_our_commands_apart(tmp_path: Path) -> None:
    text = _python("-m", "celery", "-A", "platform", "--help", folder=tmp_path).stdout
    ours, celerys = text.index("\nCommands of celery-capacity, as in"), text.index("\nCelery's commands:")
    assert ours < text.index("\n  cluster ") < celerys < text.index("\n  worker ")
    assert text.count("\n  jobs ") == 1


def test_other_groups_of_commands_list_as_ever() -> None:
    group = DYMGroup("other", commands=[click.Command("one", short_help="It is one.")])
    assert "\nCommands:\n  one  It is one." in group.get_help(click.Context(group))


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        (["-A", "platform", "jobs"], "celery -A platform jobs"),
        (["jobs"], "celery -A platform jobs"),
        (["-A", "theirs", "jobs"], "celery -A theirs jobs"),
        (["-A", "platform", "db", "upgrade"], "celery -A platform db upgrade"),
    ],
)
def test_usage_line_works_as_typed(tmp_path: Path, arguments: list[str], usage: str) -> None:
    (tmp_path / "theirs.py").write_text("from celery import Celery\napp = Celery('theirs')\n")
    script = str(Path(sys.executable).with_name("celery"))
    done = _python(script, *arguments, "--help", folder=tmp_path)
    assert done.stdout.startswith(f"Usage: {usage} [OPTIONS]"), done.stdout


def test_loading_the_entry_points_loads_neither_celery_nor_a_store() -> None:
    code = (
        "import sys\n"
        "from importlib.metadata import entry_points\n"
        "for p in entry_points(group='celery.commands'):\n"
        "    if p.module == 'celery_capacity.workers.plugin': p.load()\n"
        "print({'celery', 'kombu', 'redis', 'sqlalchemy', 'tornado'} & set(sys.modules))"
    )
    assert _python("-c", code, folder=Path("/")).stdout.strip() == "set()"


@pytest.mark.parametrize("how", [["-m", "celery"], [str(Path(sys.executable).with_name("celery"))]])
def test_no_folder_of_the_caller_hides_ours(tmp_path: Path, how: list[str]) -> None:
    for name in ("workers", "routing", "migrations"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('not mine')")
    (tmp_path / "platform").mkdir()
    done = _python(*how, "-A", "platform", "report", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "celery:5.7" in done.stdout


RAISES = "import celery_capacity.workers.plugin; from celery_capacity import SettingsError; raise {error}"


def test_an_error_of_ours_that_nobody_caught_is_a_message_and_a_code() -> None:
    done = _python("-c", RAISES.format(error="SettingsError(['PLATFORM_CPUS is wrong'])"), folder=Path("/"))
    assert done.returncode == 78  # Exit.CONFIGURATION
    assert done.stderr.startswith("celery-capacity: PLATFORM_CPUS is wrong ")
    assert len(done.stderr.splitlines()) == 1


def test_any_other_error_is_shown_as_ever() -> None:
    done = _python("-c", RAISES.format(error="KeyError('theirs')"), folder=Path("/"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("KeyError: 'theirs'\n")


@pytest.mark.parametrize("name", ["workers", "routing"])
def test_another_app_with_a_module_of_that_name_goes_on_working(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("from celery import Celery\napp = Celery('theirs')\n")
    done = _python("-m", "celery", "-A", name, "report", folder=tmp_path)
    assert done.returncode == 0
    assert "celery:5.7" in done.stdout


def test_a_command_of_ours_with_another_app_shows_its_help(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text("from celery import Celery\napp = Celery('theirs')\n")
    done = _python("-m", "celery", "-A", "theirs", "demo", "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--trace" in done.stdout
