"""Workers, beat and the dashboard as children of one command: how they are started, awaited and given up.

A child gets the URLs of the servers in its environment, for given servers and for embedded ones. So it never asks for a
pair of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from celery_capacity.platform.processes.supervisor import Child, ProcessEvent, Supervisor, celery_command, died
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import InvalidRequest, PlatformError
from celery_capacity.routing.model.amounts import MILLICORES, format_cpus, parse_cpus_text
from celery_capacity.routing.model.identifiers import check_worker_name

__all__ = [
    "DASHBOARD_PATH",
    "READY_PATIENCE",
    "ChildDied",
    "Interrupted",
    "NotReady",
    "WorkerSpec",
    "await_ready",
    "dashboard_url",
    "parse_workers",
    "pause",
    "start_worker",
]

#: Seconds that a worker may take to be ready. After a kill it waits for its predecessor's TTL of 60 s.
READY_PATIENCE = 120.0

#: Path at which the dashboard answers. The dashboard's first line ends with it.
DASHBOARD_PATH = "/api/v1/dashboard"

#: Lines of a dead child that an error shows.
SHOWN_LINES = 12

#: Slots of a worker whose jobs only sleep: enough that its CPUs are the limit, and not its slots.
LEAST_SLOTS = 40


@dataclass(frozen=True)
class WorkerSpec:
    """A worker to start; `cpus` in millicores."""

    name: str
    cpus: int

    @classmethod
    def parse(cls, text: str) -> WorkerSpec:
        """Parse NAME=CPUS. Raise InvalidRequest for any other text."""
        name, separator, cpus = text.partition("=")
        if not separator:
            raise InvalidRequest(
                f"--worker {text!r} is not NAME=CPUS", value=text, advice="Such as --worker worker-01=72."
            )
        spec = cls(check_worker_name(name), parse_cpus_text(cpus, f"--worker {name}: cpus"))
        if spec.cpus == 0:
            raise InvalidRequest(f"--worker {text!r} has no CPUs", value=text, advice="Give it at least 0.001 CPUs.")
        return spec

    @property
    def slots(self) -> int:
        return max(LEAST_SLOTS, -(-self.cpus // MILLICORES))


def parse_workers(_context: click.Context, _parameter: click.Parameter, texts: Sequence[str]) -> tuple[WorkerSpec, ...]:
    """Parse the values of `--worker NAME=CPUS`, which may be given more than once. Used as click's callback."""
    try:
        specs = tuple(WorkerSpec.parse(text) for text in texts)
    except InvalidRequest as error:
        raise click.BadParameter(str(error)) from error
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise click.BadParameter(f"the name {name} stands there twice; each worker needs its own.")
    return specs


class ChildDied(PlatformError):
    """A process that this command started ended before its time."""

    reference = "child-died"
    title = "a process of this command ended"

    def __init__(self, child: Child) -> None:
        last_lines = "\n".join(f"  {line}" for line in list(child.said)[-SHOWN_LINES:])
        super().__init__(f"{died(child)}. What it said last:\n{last_lines}" if last_lines else f"{died(child)}.")


class NotReady(PlatformError):
    """A worker neither became ready nor ended."""

    reference = "not-ready"
    title = "a worker did not become ready"


class Interrupted(Exception):
    """A signal asked this command to end. `code` is the exit code, by the convention of shells."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.code = 128 + signum


def start_worker(
    supervisor: Supervisor, spec: WorkerSpec, environ: Mapping[str, str], *, pool: str, slots: int | None = None
) -> Child:
    """Start a worker that publishes these CPUs under this name. Without `slots` Celery's default holds."""
    command = celery_command("--quiet", "worker", "--pool", pool, "--loglevel", "INFO")
    if slots is not None:
        command += ["--concurrency", str(slots)]
    worker_environ = {**environ, "NODE_NAME": spec.name, "PLATFORM_CPUS": format_cpus(spec.cpus)}
    return supervisor.start(spec.name, command, worker_environ)


def dashboard_url(settings: Settings) -> str:
    """Return the URL at which the dashboard answers."""
    host, port = settings.dashboard
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{DASHBOARD_PATH}"


def judge(event: ProcessEvent) -> None:
    """Raise the exception that ends a command: Interrupted for a signal, ChildDied for a child that ended by itself."""
    if event.what == "signal":
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
) -> list[Child]:
    """Wait until each of these children is ready or has ended, and return the ready ones.

    Ends of children and signals in the meantime go to `on_end`. Raises NotReady after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    # Collect ended children by their reported ends, not by their exit codes. A child that ended before the first look
    # must be judged too.
    ended: list[Child] = []
    while late := [
        child for child in children if not child.ready and not any(child is ended_child for ended_child in ended)
    ]:
        event = supervisor.next(deadline - time.monotonic())
        if event is None:
            names = ", ".join(child.name for child in late)
            raise NotReady(f"not ready after {patience:.0f} s: {names}", advice="Its log says what it waits for.")
        if event.what != "ready":
            if event.child is not None:
                ended.append(event.child)
            on_end(event)
    return [child for child in children if child.ready and child.code is None]
