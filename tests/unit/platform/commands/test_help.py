"""The help of every command: an option a line, examples that the commands accept, and the exit codes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from celery_capacity.platform.console.command import ALWAYS, Command, exit_code
from celery_capacity.routing import errors
from celery_capacity.workers.process.exit_codes import Exit, code_of
from tests.fixtures.documents.shapes import commands

NAMES = sorted(commands())

_EXAMPLE = re.compile(r"^ +celery -A platform (.*)$", re.MULTILINE)
_CODE = re.compile(r"^ +(\d+) +([A-Z_]+) ", re.MULTILINE)


def help_of(command: click.Command) -> str:
    """Return the text that --help prints in a terminal of 80 columns."""
    return command.get_help(click.Context(command, info_name=command.name, terminal_width=80))


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_line_of_help(name: str) -> None:
    section = help_of(commands()[name]).partition("Options:\n")[2].partition("\n\n")[0]
    options = [option for option in commands()[name].params if isinstance(option, click.Option)]
    lines = section.splitlines()
    assert len(lines) == len(options) + 1  # the line of --help
    for line in lines:
        assert re.match(r"  -[-\w, =\[\]]+ {2,}\w", line), line


@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_a_command_line_that_is_accepted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.csv").write_text("")  # of the demo's examples
    command = commands()[name]
    examples = _EXAMPLE.findall(help_of(command))
    assert examples
    for example in examples:
        words = shlex.split(example)
        length = len(name.split())
        assert words[:length] == name.split()
        with command.make_context(command.name, words[length:]):
            assert len(example) < 72  # so that it stands on one line of help


def test_the_group_of_commands_shows_examples_too() -> None:
    from celery_capacity.platform.commands.db import command

    examples = _EXAMPLE.findall(help_of(command))
    assert examples
    assert {" ".join(example.split()[:2]) for example in examples} <= set(commands())


@pytest.mark.parametrize("name", NAMES)
def test_the_help_names_the_exit_codes_that_the_command_gives(name: str) -> None:
    command = commands()[name]
    named = [(int(code), word) for code, word in _CODE.findall(help_of(command))]
    assert named == sorted(named)
    assert all(Exit[word] == code for code, word in named)
    codes = set(command.codes) if isinstance(command, Command) else {Exit.OK, Exit.USAGE}
    assert {Exit[word] for _, word in named} == codes


def test_a_code_is_one_number_and_one_name() -> None:
    assert len({code.value for code in Exit}) == len(Exit.__members__) == len(Exit)
    assert set(ALWAYS) < set(Exit)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.StoreUnavailable("x"), Exit.UNAVAILABLE),
        (errors.NoServers("x"), Exit.UNAVAILABLE),
        (errors.NameTaken("x"), Exit.UNAVAILABLE),
        (errors.NotMigrated(), Exit.CONFIGURATION),
        (errors.SettingsError(["x"]), Exit.CONFIGURATION),
        (errors.InvalidRequest("x"), Exit.FAILED),
        (errors.PlatformError("x"), Exit.FAILED),
    ],
)
def test_every_error_ends_a_command_with_a_code_of_its_kind(error: errors.PlatformError, code: Exit) -> None:
    assert code_of(error) is code
    assert exit_code(error) is code
