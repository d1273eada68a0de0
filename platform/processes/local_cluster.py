"""The processes that `up` runs on one machine: servers where none are given, workers, beat and the dashboard.

The death of a child is reported, and the child is not started again: its log says why, and the others go on. Workers
end before beat and the dashboard, so that their running jobs are kept alive and stay visible until they end.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from celery_capacity import migrations
from celery_capacity.platform.embedded import servers
from celery_capacity.platform.processes.launch import (
    DASHBOARD_PATH,
    Interrupted,
    WorkerSpec,
    await_ready,
    dashboard_url,
    start_worker,
)
from celery_capacity.platform.processes.supervisor import (
    COLD,
    WARM,
    Child,
    ProcessEvent,
    Step,
    Supervisor,
    celery_command,
    died,
)
from celery_capacity.routing.config.machine import detect
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import PlatformError, mask_url
from celery_capacity.routing.inspect import overview
from celery_capacity.routing.ledger import connection
from celery_capacity.routing.ledger.connection import quick_client
from celery_capacity.routing.model.amounts import (
    CPUS,
    MEMORY,
    SLOTS,
    cpus_number,
    format_amount,
    format_memory,
    is_named,
)
from celery_capacity.routing.model.identifiers import check_worker_name
from celery_capacity.workers.process.stores import make_engine

__all__ = ["LocalCluster", "NothingRuns", "Running"]

#: Step that ends beat and the dashboard, which have nothing to finish; patience in seconds.
SOON = Step(WARM.signum, 10.0)


class NothingRuns(PlatformError):
    """All processes that `up` had started ended by themselves."""

    reference = "nothing-runs"
    title = "no worker runs"
    default_advice = "Their last lines are above."


@dataclass(frozen=True)
class Running:
    """The running processes and their places, for people and for programs. URLs have no passwords."""

    redis_url: str
    database_url: str
    embedded: bool
    workers: tuple[overview.WorkerLine, ...]
    beat: int | None
    dashboard: int | None
    dashboard_url: str

    def to_json(self) -> dict[str, Any]:
        return {
            "redis_url": self.redis_url,
            "database_url": self.database_url,
            "embedded": self.embedded,
            "workers": [
                {
                    "name": worker.name,
                    "cpus": cpus_number(worker.capacity.get(CPUS, 0)),
                    "memory": worker.capacity.get(MEMORY, 0),
                    "slots": worker.capacity.get(SLOTS, 0),
                    "pid": worker.pid,
                }
                for worker in self.workers
            ],
            "beat": None if self.beat is None else {"pid": self.beat},
            "dashboard": None if self.dashboard is None else {"url": self.dashboard_url, "pid": self.dashboard},
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """Return a line for each process: name, process id, place. The place may be long, so it comes last."""
        kind = " (embedded)" if self.embedded else ""
        rows = [("Redis", "", self.redis_url + kind), ("Postgres", "", servers.shown_url(self.database_url) + kind)]
        rows += [(worker.name, str(worker.pid), _holds(worker.capacity)) for worker in self.workers]
        rows.append(("beat", *_or_not(self.beat, "the schedule")))
        rows.append(("dashboard", *_or_not(self.dashboard, self.dashboard_url)))
        return rows


def _holds(capacity: Mapping[str, int]) -> str:
    """Return a worker's capacity in words, as in "1 CPU, 7.8 GiB, 1 slot, 2 gpus"."""
    amounts = [format_amount(CPUS, capacity.get(CPUS, 0)), format_memory(capacity.get(MEMORY, 0))]
    amounts.append(format_amount(SLOTS, capacity.get(SLOTS, 0)))
    amounts += [format_amount(name, capacity[name]) for name in sorted(capacity) if is_named(name)]
    return ", ".join(amounts)


def _or_not(pid: int | None, address: str) -> tuple[str, str]:
    return (str(pid), address) if pid is not None else ("", "does not run here")


class LocalCluster:
    """The processes of one `up`. `say` prints a line for the user."""

    def __init__(
        self, settings: Settings, environ: Mapping[str, str], supervisor: Supervisor, say: Callable[[str], None]
    ) -> None:
        self._given = settings
        self._settings = settings
        self._environ = dict(environ)
        self._supervisor = supervisor
        self._say = say
        self._workers: list[Child] = []
        self._beat: Child | None = None
        self._dashboard: Child | None = None

    @property
    def embedded(self) -> bool:
        """Return True if no servers were given."""
        return self._given.redis_url is None

    def start(self, specs: Sequence[WorkerSpec], pool: str | None = None) -> None:
        """Start all processes and wait for the workers. Raise Interrupted, NothingRuns, and the servers' errors."""
        self._settings = servers.ensure(self._given, self._say)
        redis_url, database_url = str(self._settings.redis_url), str(self._settings.database_url)
        migrations.upgrade(database_url)
        if self.embedded:
            # Given servers stay written as they were: a URL from a file is in no child's environment.
            self._environ |= {"REDIS_URL": redis_url, "DATABASE_URL": database_url}
        worker_specs = specs or (self._whole(),)
        for spec in worker_specs:
            environ = self._environ if len(worker_specs) == 1 else {**self._environ, **self._share(spec, worker_specs)}
            self._workers.append(start_worker(self._supervisor, spec, environ, pool=pool or self._pool(spec)))
        self._beat = self._start_beat()
        self._dashboard = self._supervisor.start(
            "dashboard", celery_command("dashboard"), self._environ, ready=DASHBOARD_PATH
        )
        await_ready(self._supervisor, [*self._workers, self._dashboard], on_end=self._report)
        if all(child.code is not None for child in self._workers):
            raise NothingRuns("no worker became ready")

    def _whole(self) -> WorkerSpec:
        """Return the spec of a worker with all of this machine, under the name that it would give itself."""
        name = self._settings.node_name or check_worker_name(socket.gethostname())
        return WorkerSpec(name, detect(self._settings).capacity.get(CPUS))

    def _share(self, spec: WorkerSpec, specs: Sequence[WorkerSpec]) -> dict[str, str]:
        """Return the settings that give a worker memory in proportion to its CPUs.

        Otherwise each worker would publish all of the machine's memory. PLATFORM_MEMORY is meant for each worker.
        """
        if self._settings.memory is not None:
            return {}
        memory = detect(self._settings).capacity.get(MEMORY)
        return {"PLATFORM_MEMORY": str(memory * spec.cpus // sum(other.cpus for other in specs))}

    def _pool(self, spec: WorkerSpec) -> str:
        """Return the worker's pool: threads if it has more CPUs than the machine, else prefork.

        More CPUs than exist can only be a rehearsal with sleeping tasks, which need no process each.
        """
        machine = detect(replace(self._settings, cpus=None)).capacity.get(CPUS)
        return "prefork" if spec.cpus <= machine else "threads"

    def _start_beat(self) -> Child | None:
        """Start beat and return it, or None if another `up` already runs it.

        Each pair of servers and home has a single beat, because two would write the same schedule file. The child
        inherits the lock, so that the lock is held as long as this very beat lives.
        """
        home = self._settings.home
        servers.make_home(home)
        pair = hashlib.sha256(f"{self._settings.redis_url} {self._settings.database_url}".encode())
        schedule = home / f"beat-{pair.hexdigest()[:8]}"
        with _locked(f"{schedule}.lock") as lock:
            if lock is None:
                self._say("beat: another `up` of these servers runs it")
                return None
            command = celery_command("--quiet", "beat", "--schedule", str(schedule))
            return self._supervisor.start("beat", command, self._environ, ready="", keep_open=(lock,))

    def describe(self) -> Running:
        """Return the running processes. The workers' capacity is the capacity that they have published."""
        redis_url, database_url = str(self._settings.redis_url), str(self._settings.database_url)
        engine = make_engine(database_url, timeout=self._settings.store_timeout)
        client = connection.connect(redis_url, self._settings.store_timeout)
        try:
            live = overview.read(quick_client(client), engine, self._settings.worker_ttl).workers
        finally:
            client.close()
            engine.dispose()
        live_pids = {child.pid for child in self._workers if child.code is None}
        return Running(
            redis_url=mask_url(redis_url),
            database_url=mask_url(database_url).replace("postgresql+psycopg2://", "postgresql://", 1),
            embedded=self.embedded,
            workers=tuple(worker for worker in live if worker.pid in live_pids),
            beat=_live_pid(self._beat),
            dashboard=_live_pid(self._dashboard),
            dashboard_url=self._dashboard_url(),
        )

    def _dashboard_url(self) -> str:
        """Return the URL that the dashboard reports, because the system may have chosen its port."""
        words = self._dashboard.ready_line.split() if self._dashboard is not None else []
        return words[-1] if words else dashboard_url(self._settings)

    def _report(self, event: ProcessEvent) -> None:
        if event.what == "signal":
            raise Interrupted(event.signum)
        if event.what == "ended" and event.child is not None:
            self._say(died(event.child))

    def watch(self) -> None:
        """Report each dying child, until a signal (Interrupted) or until no child is left (NothingRuns)."""
        while self._supervisor.running():
            event = self._supervisor.next()
            if event is not None:
                self._report(event)
        raise NothingRuns("all that was started has ended", advice="Its last lines are above.")

    def end(self) -> None:
        """End the workers warm, then beat, then the dashboard. A signal in the meantime breaks running jobs off."""
        if any(child.code is None for child in self._workers):
            self._say("Ending the workers; running jobs come to their end first (Ctrl-C again breaks them off).")
        self._supervisor.end(self._workers, (WARM, COLD))
        for child in (self._beat, self._dashboard):
            if child is not None:
                self._supervisor.end([child], (SOON,))


def _live_pid(child: Child | None) -> int | None:
    return child.pid if child is not None and child.code is None else None


@contextmanager
def _locked(path: str) -> Iterator[int | None]:
    """Open this file and yield its locked descriptor for the block, or None if another process has the lock.

    The lock belongs to the open file: a child that inherited the descriptor keeps it after the block.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)
