"""`celery -A platform settings`: each setting with its value, its default and its meaning."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from celery_capacity.platform.console.command import Command, json_option
from celery_capacity.platform.console.terminal import facts, harmless, print_json, talk
from celery_capacity.routing.config.redaction import HIDDEN
from celery_capacity.routing.errors import InvalidRequest, SettingsError, mask_url
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Line:
    """A setting.

    `value`: as it was written, passwords masked; None where it is not set. `problem`: "" where it is right.
    """

    name: str
    value: str | None
    default: str
    unit: str
    meaning: str
    problem: str

    def to_json(self) -> dict[str, Any]:
        words = {"value": self.value, "default": self.default or None, "problem": self.problem or None}
        return {"name": self.name, **words, "unit": self.unit or None, "meaning": self.meaning}


@click.command(
    "settings",
    cls=Command,
    examples=(
        ("All settings", "celery -A platform settings"),
        ("Those that this environment sets", "celery -A platform settings --set"),
        ("The same for a program", "celery -A platform settings --json"),
    ),
    codes={Exit.FAILED: "a value is wrong, and the output says why"},
    never=(Exit.UNAVAILABLE, Exit.CONFIGURATION),
)
@click.option("--set", "only_set", is_flag=True, help="Only settings that this environment sets, and wrong ones.")
@json_option
@click.pass_context
def command(context: click.Context, only_set: bool, as_json: bool) -> None:
    """List the settings: value, default, unit and meaning.

    Settings are variables of the environment. Passwords in URLs and the token are masked. No store is asked.
    """
    from celery_capacity.routing.config.settings import unknown_names

    for warning in unknown_names(os.environ):
        talk().print(f"Warning: {warning}")
    lines = _with_contradictions(_lines(os.environ), os.environ)
    lines = [line for line in lines if line.value is not None or line.problem or not only_set]
    if as_json:
        print_json([line.to_json() for line in lines])
    else:
        _show(facts(), lines)
    context.exit(Exit.FAILED if any(line.problem for line in lines) else Exit.OK)


def _lines(environ: Mapping[str, str]) -> list[Line]:
    from celery_capacity.routing.config import secret_files
    from celery_capacity.routing.config.settings import described

    lines = []
    for _, meaning in described():
        name, problem = meaning.env, ""
        value = environ.get(name, "").strip() or None
        path = environ.get(name + secret_files.SUFFIX, "").strip() if name in secret_files.FROM_FILES else ""
        try:
            secret_files.parsed(environ, name, meaning.parse)
        except InvalidRequest as error:
            problem = str(error)
        secret = name in secret_files.NO_URL
        if path:
            shown: str | None = f"the {'token' if secret else 'URL'} in the file {path}"
        else:
            shown = None if value is None else HIDDEN if secret else mask_url(value)
        lines.append(Line(name, shown, meaning.shown, meaning.unit, meaning.text, problem))
    return lines


def _with_contradictions(lines: Sequence[Line], environ: Mapping[str, str]) -> list[Line]:
    """Add the problems of values that are out of range or contradict each other. Each begins with a line's name."""
    from celery_capacity.routing.config.settings import Settings

    try:
        Settings.from_environ(environ)
        problems: tuple[str, ...] = ()
    except SettingsError as error:
        problems = error.problems
    checked = []
    for line in lines:
        more = [problem for problem in problems if problem.startswith((f"{line.name}=", f"{line.name} "))]
        checked.append(line if line.problem or not more else replace(line, problem=" ".join(more)))
    return checked


def _show(console: Console, lines: list[Line]) -> None:
    for line in lines:
        unit = f" ({line.unit})" if line.unit else ""
        value = "" if line.value is None else f" = {line.value}"
        default = f"   default: {line.default}" if line.default else ""
        head = Text.assemble((line.name, "bold" if line.value is not None else ""), harmless(value), unit, default)
        console.print(head)
        console.print(f"    {line.meaning}")
        if line.problem:
            console.print(Text.assemble("    ", ("wrong: ", "bold red"), harmless(line.problem)))
    if not lines:
        console.print("no setting is set: the defaults hold")
