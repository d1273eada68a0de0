"""Workers, beat and the dashboard as children of one command: how they are started, awaited and given up.

A child gets the URLs of the servers in its environment, for given servers and for embedded ones. So it never asks for a
pair of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

from celery_capacity.platform.processes.supervisor import (
    Child,
    ProcessEvent,
    Supervisor,
    celery_command,
    died,
    script_command,
)
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import InvalidRequest, PlatformError
from celery_capacity.routing.model.amounts import (
    CPUS,
    GPUS,
    MEMORY,
    MILLICORES,
    SLOTS,
    format_cpus,
    parse_count_text,
    parse_cpus_text,
    parse_memory,
    refuse_standard,
)
from celery_capacity.routing.model.identifiers import check_resource_name, check_worker_name

#: Seconds that a worker may take to be ready. After a kill it waits for its predecessor's TTL of 60 s.
READY_PATIENCE = 120.0

#: Seconds between two reports of the children that are not ready.
LOOK = 0.1

#: Path at which the dashboard answers. The dashboard's first line ends with it.
DASHBOARD_PATH = "/api/v1/dashboard"

#: Lines of a dead child that an error shows.
SHOWN_LINES = 12

#: Slots of a worker whose jobs only sleep: enough that its CPUs are the limit, and not its slots.
LEAST_SLOTS = 40


@dataclass(frozen=True)
class WorkerSpec:
    """A worker to start: `cpus` in millicores, `memory` in bytes; None where the environment or the machine decides."""

    name: str
    cpus: int
    memory: int | None = None
    gpus: int | None = None
    concurrency: int | None = None
    resources: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> WorkerSpec:
        """Parse NAME=CPUS, or NAME=cpus:8,memory:32GiB,gpus:1,licence:2. Raise InvalidRequest for any other text."""
        name, separator, amounts = text.partition("=")
        if not separator:
            raise InvalidRequest(
                f"--worker {text!r} is not NAME=CPUS",
                value=text,
                advice="Such as --worker worker-01=72, or --worker gpu=cpus:8,memory:32GiB,gpus:1.",
            )
        spec = cls(check_worker_name(name), **_parse_amounts(amounts, f"--worker {name}"))
        if spec.cpus == 0:
            raise InvalidRequest(f"--worker {text!r} has no CPUs", value=text, advice="Give it at least 0.001 CPUs.")
        return spec

    @property
    def slots(self) -> int:
        return max(LEAST_SLOTS, -(-self.cpus // MILLICORES))

    def environ(self) -> dict[str, str]:
        """Return the settings of the worker that the text names."""
        settings = {"NODE_NAME": self.name, "PLATFORM_CPUS": format_cpus(self.cpus)}
        if self.memory is not None:
            settings["PLATFORM_MEMORY"] = str(self.memory)
        if self.gpus is not None:
            settings["PLATFORM_GPUS"] = str(self.gpus)
        if self.resources:
            settings["PLATFORM_RESOURCES"] = ",".join(f"{name}={count}" for name, count in self.resources)
        return settings


#: Amounts of a worker with a meaning of their own: how each is read, and its name in WorkerSpec.
AMOUNTS: dict[str, tuple[Callable[[str, str], int], str]] = {
    CPUS: (parse_cpus_text, "cpus"),
    MEMORY: (parse_memory, "memory"),
    GPUS: (parse_count_text, "gpus"),
    SLOTS: (parse_count_text, "concurrency"),
}


def _parse_amounts(text: str, what: str) -> dict[str, Any]:
    """Return the amounts of a worker by the names of WorkerSpec. A number alone is CPUs."""
    values: dict[str, Any] = {}
    named: dict[str, int] = {}
    for part in text.split(","):
        key, separator, amount = (piece.strip() for piece in part.partition(":"))
        if not separator:
            key, amount = CPUS, key
        if key.lower() in AMOUNTS:
            parse, field = AMOUNTS[key.lower()]
            twice, target, value = field in values, values, parse(amount, f"{what}: {key.lower()}")
        else:
            field = refuse_standard(check_resource_name(key, f"{what}: resource name"), what)
            twice, target, value = field in named, named, parse_count_text(amount, f"{what}: {key}")
        if twice:
            raise InvalidRequest(f"{what} has {key} twice", value=text, advice="Name each amount once.")
        target[field] = value
    if "cpus" not in values:
        raise InvalidRequest(f"{what} says no CPUs: {text!r}", value=text, advice=f"Such as {what}=cpus:8,{text}.")
    if values.get("concurrency") == 0:
        raise InvalidRequest(f"{what} has no slots", value=text, advice="Give it at least one, or leave slots out.")
    return {**values, "resources": tuple(sorted(named.items()))}


def parse_workers(_context: click.Context, _parameter: click.Parameter, texts: Sequence[str]) -> tuple[WorkerSpec, ...]:
    """Parse the values of `--worker`, which may be given more than once. Used as click's callback."""
    try:
        specs = tuple(WorkerSpec.parse(text) for text in texts)
    except InvalidRequest as error:
        raise click.BadParameter(str(error)) from error
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise click.BadParameter(f"the name {name} stands there twice; each worker needs its own.")
    return specs


#: Option of a command that starts workers.
workers_option: Final = click.option(
    "--worker",
    "workers",
    metavar="NAME=CPUS",
    multiple=True,
    callback=parse_workers,
    help="A worker to start; again for more.",
)


class ChildDied(PlatformError):
    """A process that this command started ended before its time."""

    reference = "child-died"
    title = "a process of this command ended"

    def __init__(self, child: Child) -> None:
        last_lines = "\n".join(f"  {line}" for line in list(child.last_lines)[-SHOWN_LINES:])
        super().__init__(f"{died(child)}. What it said last:\n{last_lines}" if last_lines else f"{died(child)}.")


class NotReady(PlatformError):
    """A worker neither became ready nor ended."""

    reference = "not-ready"
    title = "a worker did not become ready"


class Interrupted(Exception):
    """A signal asked this command to end, or nobody reads its output. `code` is the exit code, as shells count."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.code = 128 + signum


def start_worker(
    supervisor: Supervisor, spec: WorkerSpec, environ: Mapping[str, str], *, pool: str, slots: int | None = None
) -> Child:
    """Start a worker that publishes these amounts under this name. Without any slots Celery's default holds."""
    command = celery_command("--quiet", "worker", "--pool", pool, "--loglevel", "INFO")
    if (concurrency := spec.concurrency or slots) is not None:
        command += ["--concurrency", str(concurrency)]
    return supervisor.start(spec.name, command, {**environ, **spec.environ()})


def start_page(supervisor: Supervisor, environ: Mapping[str, str]) -> Child:
    """Start a dashboard for this machine alone, on a free port."""
    command = script_command("dashboard", "--host", "127.0.0.1", "--port", "0")
    return supervisor.start("dashboard", command, environ, ready=DASHBOARD_PATH)


def page_of(dashboard: Child) -> str:
    """Return the URL of the page of a dashboard that is ready."""
    return dashboard.ready_line.split()[-1].removesuffix(DASHBOARD_PATH) + "/"


def dashboard_url(settings: Settings) -> str:
    """Return the URL at which the dashboard answers."""
    host, port = settings.dashboard
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{DASHBOARD_PATH}"


def judge(event: ProcessEvent) -> None:
    """Raise the exception that ends a command: Interrupted for a signal, ChildDied for a child that ended by itself."""
    if event.what in ("signal", "lost"):
        raise Interrupted(event.signum)
    if event.what == "ended" and event.child is not None:
        raise ChildDied(event.child)


def pause(supervisor: Supervisor, seconds: float) -> None:
    """Wait, unless a signal or the end of a child ends the command, as `judge` decides."""
    deadline = time.monotonic() + seconds
    while (event := supervisor.next(deadline - time.monotonic())) is not None:
        judge(event)


def await_ready(
    supervisor: Supervisor,
    children: Sequence[Child],
    patience: float = READY_PATIENCE,
    on_end: Callable[[ProcessEvent], Any] = judge,
    waiting: Callable[[Sequence[Child], float], None] | None = None,
) -> list[Child]:
    """Wait until each of these children is ready or has ended, and return the ready ones.

    Ends of children and signals in the meantime go to `on_end`. `waiting` is called again and again with the children
    that are not ready and the seconds so far. Raises NotReady after `patience` seconds.
    """
    since = time.monotonic()
    deadline = since + patience
    # Collect ended children by their reported ends, not by their exit codes. A child that ended before the first look
    # must be judged too.
    ended: list[Child] = []
    while late := [
        child for child in children if not child.ready and not any(child is ended_child for ended_child in ended)
    ]:
        remaining = deadline - time.monotonic()
        event = supervisor.next(remaining if waiting is None else min(remaining, LOOK))
        if event is None and waiting is not None and remaining > LOOK:
            waiting(late, time.monotonic() - since)
            continue
        if event is None:
            names = ", ".join(child.name for child in late)
            raise NotReady(f"not ready after {patience:.0f} s: {names}", advice="Its log says what it waits for.")
        if event.what != "ready":
            if event.child is not None:
                ended.append(event.child)
            on_end(event)
    return [child for child in children if child.ready and child.code is None]
