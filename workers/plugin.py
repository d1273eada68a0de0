"""Entry point that every `celery` command imports first: it makes `-A platform` find this project.

The standard library has a module `platform`, which is loaded long before Celery resolves `-A platform`. Therefore our
folder `platform/` has no `__init__.py`. Importing this module, an entry point of the group `celery.commands`, gives the
standard module a `__path__`. From then on `platform.celery` is found there, and `platform.system()` stays as it was.

This module also names the project's commands, for `celery` and for the script `capacity`. And it lets a user's mistake
end Celery's own commands as it ends ours: with a message and an exit code. Nothing else happens here. A command is
loaded when it is called, so `celery -A another_app worker` pays nothing.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import click
from click_didyoumean import DYMGroup

from celery_capacity.workers import interrupts

#: The folder `platform/` that was installed beside this package.
FOLDER = Path(__file__).resolve().parent.parent / "platform"

if str(FOLDER) not in getattr(platform, "__path__", ()):
    # If other code made `platform` a package already, our folder is searched last.
    platform.__path__ = [*getattr(platform, "__path__", ()), str(FOLDER)]

#: The hook that showed uncaught errors before ours.
_show = sys.excepthook


def _say_cleanly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show an uncaught error: one of the platform as a message and an exit code, without its traceback."""
    errors = sys.modules.get("celery_capacity.routing.errors")
    if errors is None or not isinstance(error, errors.PlatformError):
        _show(kind, error, trace)
        return
    from celery_capacity.workers.process.exit_codes import code_of

    print(f"celery-capacity: {error}", file=sys.stderr)
    # The interpreter ends with the exception that its hook raises.
    raise SystemExit(code_of(error))


sys.excepthook = _say_cleanly


class Lazy(click.Command):
    """Stand-in for a command of `platform` in a list of commands, until the command is called.

    Click asks a subcommand for a context, and then goes on with the command of that context. So it is enough to hand
    over there. `group`: its heading in the help of `capacity`.
    """

    def __init__(self, name: str, module: str, group: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self.module = f"celery_capacity.platform.{module}"
        self.group = group

    def load(self) -> click.Command:
        """Import the module, and return its command."""
        command: click.Command = import_module(self.module).command
        return command

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if parent is not None:
            parent.info_name = as_typed(parent)
        return self.load().make_context(info_name, args, parent, **extra)


def as_typed(context: click.Context) -> str:
    """Return the words that stand before a command, such as "celery -A platform", from the context of its group."""
    words = context.info_name or "celery"
    app = context.params.get("app")
    if " -A " in words or (words == SCRIPT and app in (None, PLATFORM)):
        return words
    return f"{words} -A {app if isinstance(app, str) else PLATFORM}"


#: Name of the app that is meant without `-A`, and of the script beside `celery`.
PLATFORM: Final = "platform"
SCRIPT: Final = "capacity"

#: All commands in the order of the help: name, module in `platform`, heading, one line of help. setup.cfg
#: names each once more, for `celery`.
COMMANDS: Final = (
    Lazy("up", "commands.up", "Start", "Servers, workers, beat and dashboard on this machine."),
    Lazy("demo", "commands.demo", "Start", "Replay a trace of real jobs on workers of its own."),
    Lazy("servers", "commands.servers", "Start", "Start the embedded servers alone."),
    Lazy("dashboard", "commands.dashboard", "Start", "Serve the dashboard's data over HTTP."),
    Lazy("down", "commands.down", "Start", "End the embedded servers; their data stay."),
    Lazy("cluster", "commands.cluster", "Look", "Workers and what they have free, and the backlog."),
    Lazy("top", "monitor.top", "Look", "Workers, backlog and reasons, live."),
    Lazy("tail", "monitor.tail", "Look", "What becomes of jobs, as it happens."),
    Lazy("workers", "monitor.workers", "Look", "The live workers, chosen and sorted."),
    Lazy("backlog", "monitor.backlog", "Look", "What waits, and why."),
    Lazy("stats", "monitor.stats", "Look", "Figures of each task: failures, waits and run times."),
    Lazy("jobs", "commands.jobs", "Look", "List jobs by state, task, worker, queue or age."),
    Lazy("job", "commands.job", "Look", "One job: times, worker, attempts, and why it waits."),
    Lazy("logs", "monitor.logs", "Look", "What a job has logged and printed."),
    Lazy("simulate", "commands.simulate", "Look", "When the jobs of a trace would start, in virtual time."),
    Lazy("whatif", "planning.whatif", "Look", "How the backlog would empty with other workers."),
    Lazy("submit", "actions.submit", "Act", "Submit a job by the name of its task."),
    Lazy("wait", "actions.wait", "Act", "Wait until jobs have ended; the exit code says how."),
    Lazy("cancel", "actions.cancel", "Act", "Cancel jobs for good, and say what became of each."),
    Lazy("retry", "actions.retry", "Act", "Run ended jobs again, as new jobs."),
    Lazy("priority", "actions.priority", "Act", "Give jobs that wait or run another priority."),
    Lazy("cordon", "actions.cordon", "Hold back", "Admit nothing more to workers; what runs there goes on."),
    Lazy("uncordon", "actions.uncordon", "Hold back", "Admit jobs to workers again."),
    Lazy("drain", "actions.drain", "Hold back", "Let workers become empty, for maintenance."),
    Lazy("pause", "actions.pause", "Hold back", "Start nothing more of a queue, a task, or at all."),
    Lazy("resume", "actions.resume", "Hold back", "Start a queue, a task, or everything again."),
    Lazy("tenant", "commands.tenant", "Hold back", "Share the workers: weights, nominal shares, quotas."),
    Lazy("verify", "commands.verify", "Maintain", "Check workers, totals, heartbeats, reads and the invariants."),
    Lazy("reconcile", "commands.reconcile", "Maintain", "Make Redis equal Postgres, and say what differed."),
    Lazy("db", "commands.db", "Maintain", "Make, upgrade or look at the tables in Postgres."),
    Lazy("settings", "commands.settings", "Maintain", "List the settings: value, default and meaning."),
)
_BY_NAME: Final = {command.name: command for command in COMMANDS}

_called = interrupts.command_of(sys.argv[1:])
#: The script `celery`, or the file that `python -m celery` runs.
_program: Final = Path(sys.argv[0]).parts
# Another program that imports Celery's commands keeps its own way with Ctrl-C.
if _called in _BY_NAME and (_program[-1:] == ("celery",) or _program[-2:] == ("celery", "__main__.py")):
    interrupts.end_at_once(_called)


def __getattr__(name: str) -> Lazy:
    """Return a command by its name, for the entry points."""
    command = _BY_NAME.get(name)
    if command is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return command


def write_commands(formatter: click.HelpFormatter, heading: str, commands: Iterable[tuple[str, str]]) -> None:
    """Write a section of a list of commands: (name, line of help)."""
    with formatter.section(heading):
        formatter.write_dl(list(commands))


_list_all = DYMGroup.format_commands


def _list_apart(group: DYMGroup, context: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the commands of `celery --help`: the platform's under a heading of their own, before Celery's."""
    if not any(isinstance(command, Lazy) for command in group.commands.values()):
        _list_all(group, context, formatter)
        return
    names = [str(command.name) for command in COMMANDS]
    others = [name for name in group.list_commands(context) if name not in names and not group.commands[name].hidden]
    lines = {name: (name, group.commands[name].get_short_help_str(formatter.width)) for name in (*names, *others)}
    write_commands(
        formatter, f"Commands of celery-capacity, as in `celery -A {PLATFORM} jobs`", [lines[name] for name in names]
    )
    write_commands(formatter, "Celery's commands", [lines[name] for name in others])


# Celery gives no place for headings. Other groups of this class have none of our commands, and list them as ever.
DYMGroup.format_commands = _list_apart
