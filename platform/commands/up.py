"""`celery -A platform up`: servers, workers, beat and the dashboard on this machine, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import click

from celery_capacity.platform.console.command import Command, WrongUsage, log_format_option, settings_of_environment
from celery_capacity.platform.console.terminal import OutputLost, facts, forsake, print_json, table
from celery_capacity.platform.processes.launch import Interrupted, WorkerSpec, workers_option
from celery_capacity.platform.processes.local_cluster import LocalCluster
from celery_capacity.platform.processes.speaker import Speaker
from celery_capacity.platform.processes.supervisor import Supervisor
from celery_capacity.workers.logs import log_format
from celery_capacity.workers.membership.preflight import check_imports, missing_modules
from celery_capacity.workers.process.exit_codes import Exit

#: Setting that names modules with tasks.
IMPORTS = "PLATFORM_IMPORTS"
#: Names under which the module of the platform's own app may be loaded.
APPS = ("platform.celery", "celery_capacity.platform.celery")


def _parse_modules(_context: click.Context, _parameter: click.Parameter, texts: Sequence[str]) -> tuple[str, ...]:
    """Parse names of modules, several of them with commas in between, and refuse one that is not there."""
    names = tuple(name.strip() for text in texts for name in text.split(",") if name.strip())
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise click.BadParameter(f"{name!r} is not the name of a module. Such as tasks, or jobs.nightly.")
    return names


def _check_modules(names: Sequence[str]) -> None:
    """Raise WrongUsage for a module that is not there."""
    for name in missing_modules(names):
        advice = "Start in the folder where it is, or install it."
        if name.endswith(".py"):
            advice = f"Give the module's name, without the ending: {name.removesuffix('.py')}."
        raise WrongUsage(
            f"there is no module {name!r} in {Path.cwd()}, nor among what is installed for {sys.executable}",
            value=name,
            advice=advice,
        )


@click.command(
    "up",
    cls=Command,
    examples=(
        ("One worker with all of this machine", "celery -A platform up"),
        ("The tasks of tasks.py in this folder", "celery -A platform up tasks"),
        ("Two workers that share it", "celery -A platform up --worker worker-01=12 --worker worker-02=4"),
        ("A worker with a GPU", "celery -A platform up tasks --worker gpu=cpus:8,memory:32GiB,gpus:1"),
        ("A rehearsal on threads, with more CPUs than there are", "celery -A platform up --worker big=72 -P threads"),
    ),
    codes={
        Exit.OK: "ended by Ctrl-C or `kill` after all was ready",
        Exit.FAILED: "no worker became ready, or none is left",
        Exit.HANGUP: Exit.HANGUP.meaning,
        Exit.INTERRUPTED: "ended by Ctrl-C before all was ready",
        Exit.TERMINATED: "ended by `kill` before all was ready",
    },
)
@click.argument("modules", metavar="[MODULE]...", nargs=-1, callback=_parse_modules)
@click.option(
    "-I",
    "--include",
    metavar="MODULE",
    multiple=True,
    callback=_parse_modules,
    help="A module with tasks, as MODULE is; again for more.",
)
@workers_option
@click.option(
    "-P", "--pool", metavar="POOL", type=click.Choice(["prefork", "threads", "solo"]), help="Pool of the workers."
)
@log_format_option
@click.option("--json", "as_json", is_flag=True, help="Print what runs as JSON once it is ready.")
@click.pass_context
def command(
    context: click.Context,
    modules: tuple[str, ...],
    include: tuple[str, ...],
    workers: tuple[WorkerSpec, ...],
    pool: str | None,
    as_json: bool,
) -> None:
    """Run the platform on this machine until Ctrl-C.

    Starts the embedded servers (unless REDIS_URL and DATABASE_URL are set), brings the tables up to date, and
    starts workers, beat and the dashboard; prints what runs where. Ctrl-C ends the workers warm (running jobs
    come to their end), then beat, then the dashboard; Ctrl-C again breaks running jobs off. The servers stay
    until `celery -A platform down`.

    MODULE is a module with tasks, such as `tasks` for tasks.py in this folder. PLATFORM_IMPORTS names more.
    Without --worker there is one with all of this machine. Several share its memory as they do its CPUs. Instead
    of CPUS, cpus:8,memory:32GiB,gpus:1,licence:2 says all that a worker has; slots:4 is how many jobs it runs at once.
    POOL is prefork (the default), threads (that of a worker with more CPUs than this machine has) or solo.
    """
    _check_app(context)
    _check_modules((*modules, *include))
    speaker = Speaker(sys.stderr, as_json=log_format.is_asked_for())
    with closing(speaker):
        context.exit(_run(speaker, workers, pool, as_json, _environ(os.environ, (*modules, *include))))


def _check_app(context: click.Context) -> None:
    """Raise WrongUsage for an app of the user's, whose workers this command would not start."""
    typed = context.find_root().params.get("app")
    if typed is None or any(context.obj.app is getattr(sys.modules.get(name), "app", None) for name in APPS):
        return
    raise WrongUsage(
        f"up starts workers of `-A platform`, and not of `-A {typed}`",
        value=str(typed),
        advice="Name the modules of your tasks: `celery -A platform up tasks`. Or start `celery -A platform servers"
        f" start`, and then the workers of your app: `celery -A {typed} worker`.",
    )


def _environ(environ: Mapping[str, str], modules: Sequence[str]) -> dict[str, str]:
    """Return the environment with these modules of tasks beside those that it names."""
    if not modules:
        return dict(environ)
    named = [name for name in environ.get(IMPORTS, "").split(",") if name.strip()]
    return {**environ, IMPORTS: ",".join(dict.fromkeys((*named, *modules)))}


def _run(
    speaker: Speaker, workers: tuple[WorkerSpec, ...], pool: str | None, as_json: bool, environ: Mapping[str, str]
) -> int:
    """Run all processes until a signal, or until nobody reads the output, and return the exit code."""
    settings = settings_of_environment()
    check_imports(settings.imports)
    supervisor = Supervisor(speaker.say_of)
    speaker.on_lost = supervisor.lost
    code, ready = int(Exit.OK), False
    with closing(supervisor), supervisor.interruptible():
        cluster = LocalCluster(settings, environ, supervisor, speaker)
        try:
            cluster.start(workers, pool)
            _show(cluster, as_json)
            ready = True
            cluster.watch()
        except Interrupted as interrupted:
            asked_to_end = ready and interrupted.signum in (signal.SIGINT, signal.SIGTERM)
            code = int(Exit.OK) if asked_to_end else interrupted.code
            speaker.say("Ending." if ready else "Interrupted.")
        finally:
            cluster.end()
            if code or supervisor.children:
                speaker.say(cluster.last_line())
    return code


def _show(cluster: LocalCluster, as_json: bool) -> None:
    """Print what runs where. Raise Interrupted where nobody reads it."""
    try:
        _print(cluster, as_json)
    except BrokenPipeError as error:
        forsake(sys.stdout)
        raise Interrupted(signal.SIGPIPE) from error
    except OutputLost as error:
        if error.terminal_closed:
            forsake(sys.stdout)
            raise Interrupted(signal.SIGHUP) from error
        raise


def _print(cluster: LocalCluster, as_json: bool) -> None:
    running = cluster.describe()
    if as_json:
        print_json(running.to_json())
        return
    console = facts()
    table(console, ("what", "pid", "where"), running.rows(), right=(1,))
    console.print()
    look = "Look from anywhere: celery -A platform cluster"
    if running.dashboard is not None:
        look += f", or curl {running.dashboard_url}"
    console.print(look)
    console.print("Ctrl-C ends the workers, beat and the JSON API; the servers stay.")
