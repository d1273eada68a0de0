"""The script `capacity`: the commands of `celery -A platform`, with a help of its own and a quick start.

A command of the platform is imported when it is called, and Celery only if the command needs an app. Celery's own
commands, and all commands of another app (`-A`), are handed to Celery with the same arguments.
"""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import click

from celery_capacity.platform.console.command import Invocation, write_examples
from celery_capacity.workers import interrupts
from celery_capacity.workers.plugin import COMMANDS, PLATFORM, SCRIPT, write_commands

#: Celery's own commands and Flower's, with their lines of help: reading them from Celery would import it.
CELERY: Final = {
    "worker": "Start a worker.",
    "beat": "Start the scheduler of periodic tasks.",
    "flower": "Serve Flower, a page of workers and tasks.",
    "call": "Call a task by name.",
    "result": "Print the result of a task.",
    "purge": "Cancel all waiting jobs of the queues.",
    "inspect": "Ask the workers, and print their answers.",
    "control": "Change the workers while they run.",
    "status": "List the workers that are online.",
    "list": "Print facts of the broker.",
    "events": "Watch the events of tasks and workers.",
    "multi": "Start, stop or restart several workers.",
    "shell": "Open a Python shell with the app.",
    "report": "Print facts for a report of a bug.",
    "graph": "Draw the workers' parts as a graph.",
    "logtool": "Read the log files of workers.",
    "amqp": "Open a shell to an AMQP broker.",
    "migrate": "Copy tasks from one broker to another.",
    "upgrade": "Rewrite a configuration of an older Celery.",
}

_EXAMPLES: Final = (
    ("Servers, a worker, beat and the dashboard on this machine", "capacity up"),
    ("What there is, what is taken, what waits", "capacity cluster"),
    ("Why a job waits", "capacity job ID"),
    ("A worker with the tasks of your project", "capacity -A proj worker"),
)


class HandedOver(click.Command):
    """Stand-in for a command that Celery carries out."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if parent is not None and not parent.resilient_parsing:
            hand_over(parent, [str(self.name), *args])
        command: click.Command = _celery().commands[str(self.name)]
        return command.make_context(info_name, args, parent, **extra)


def _celery() -> Any:
    from celery import maybe_patch_concurrency

    if "multi" not in sys.argv:
        maybe_patch_concurrency()
    from celery.bin.celery import celery

    return celery


def hand_over(context: click.Context, arguments: list[str]) -> None:
    """Have Celery carry out a command. `context`: the one of `capacity`. Does not return.

    Celery reads `sys.argv` for what it starts: the workers of `multi` and `--detach`, and a restart by SIGHUP.
    """
    options = context.params
    words = ["-A", options["app"] or PLATFORM]
    words += ["--no-color"] if options["no_color"] else []
    words += ["--quiet"] if options["quiet"] else []
    sys.argv[1:] = [*words, *arguments]
    celery = _celery()
    interrupts.as_python_does()
    celery.main(sys.argv[1:], prog_name=context.info_name, auto_envvar_prefix="CELERY")


class Script(click.Group):
    """The group of all commands: the platform's, Celery's, and those of other packages for `celery`."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return [*(str(command.name) for command in COMMANDS), *CELERY]

    def get_command(self, context: click.Context, cmd_name: str) -> click.Command | None:
        ours = next((command for command in COMMANDS if command.name == cmd_name), None)
        if ours is not None and context.params.get("app") in (None, PLATFORM):
            return ours
        celerys = ours is not None or cmd_name in CELERY or _is_extension(cmd_name)
        return HandedOver(cmd_name, short_help=CELERY.get(cmd_name)) if celerys else None

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(context, args)
        except click.UsageError as error:
            near = get_close_matches(args[0], self.list_commands(context), cutoff=0.5)
            advice = f"Did you mean {' or '.join(near)}?" if near else f"`{SCRIPT} --help` lists them."
            raise click.UsageError(f"There is no command {args[0]!r}. {advice}", error.ctx) from error

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        for heading in dict.fromkeys(command.group for command in COMMANDS):
            lines = [(str(ours.name), str(ours.short_help)) for ours in COMMANDS if ours.group == heading]
            write_commands(formatter, heading, lines)
        write_commands(formatter, "Celery's commands", CELERY.items())

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(context, formatter, _EXAMPLES)


def _is_extension(name: str) -> bool:
    """Return whether another package extends `celery` by a command of this name."""
    from importlib.metadata import entry_points  # slow to import, and hardly ever needed

    return any(point.name == name for point in entry_points(group="celery.commands"))


def _change_folder(_context: click.Context, _parameter: click.Parameter, folder: Path | None) -> None:
    if folder is not None:
        os.chdir(folder)


@click.group(SCRIPT, cls=Script, no_args_is_help=True)
@click.option(
    "-A", "--app", metavar="APP", envvar="CELERY_APP", help="Your Celery app, as in `celery -A`; by default our own."
)
@click.option(
    "--workdir",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    callback=_change_folder,
    expose_value=False,
    is_eager=True,
    help="Change to this folder first.",
)
@click.option("-C", "--no-color", is_flag=True, help="Print no colours.")
@click.option("-q", "--quiet", is_flag=True, help="Have Celery's commands print less.")
@click.version_option(message="%(version)s", package_name="celery-capacity")
@click.pass_context
def capacity(context: click.Context, app: str | None, no_color: bool, quiet: bool) -> None:
    """Run and watch tasks that start where their CPUs, memory and GPUs are free.

    Each command is one of `celery -A platform` too.
    """
    context.obj = Invocation(no_color)
