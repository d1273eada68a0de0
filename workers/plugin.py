"""Entry point that every `celery` command imports first: it makes `-A platform` find this project.

The standard library has a module `platform`, which is loaded long before Celery resolves `-A platform`. Therefore our
folder `platform/` has no `__init__.py`. Importing this module, an entry point of the group `celery.commands`, gives the
standard module a `__path__`. From then on `platform.celery` is found there, and `platform.system()` stays as it was.

This module also names the project's commands. And it lets a user's mistake end Celery's own commands as it ends ours:
with a message and an exit code. Nothing else happens here. A command is loaded when it is called, so
`celery -A another_app worker` pays nothing.
"""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import click

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
    """Stand-in for `platform.commands.<name>.command` in Celery's list of commands, until the command is called.

    Click asks a subcommand for a context, and then goes on with the command of that context. So it is enough to hand
    over there.
    """

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        command: click.Command = import_module(f"celery_capacity.platform.commands.{self.name}").command
        return command.make_context(info_name, args, parent, **extra)


cluster = Lazy("cluster", short_help="The cluster: totals, a bar per worker, the backlog.")
dashboard = Lazy("dashboard", short_help="Serve the dashboard's data over HTTP.")
db = Lazy("db", short_help="Make, upgrade or look at the tables in Postgres.")
demo = Lazy("demo", short_help="Replay a trace of real jobs on workers of its own.")
down = Lazy("down", short_help="End the embedded servers; their data stay.")
job = Lazy("job", short_help="One job: times, worker, attempts, and why it waits.")
jobs = Lazy("jobs", short_help="The list of jobs.")
reconcile = Lazy("reconcile", short_help="Make Redis equal Postgres, and say what differed.")
servers = Lazy("servers", short_help="Start the embedded servers alone.")
up = Lazy("up", short_help="Servers, workers, beat and dashboard on this machine.")
verify = Lazy("verify", short_help="Check workers, totals, heartbeats, reads and the invariants.")
