"""The processes that `up` runs on one machine: servers where none are given, workers, beat and the dashboard.

The death of a child is reported, and the child is started again where that can help (`restarts`). Workers end before
beat and the dashboard, so that their running jobs are kept alive and stay visible until they end.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from celery_capacity.platform.embedded import servers
from celery_capacity.platform.embedded.os_user import USER
from celery_capacity.platform.embedded.starting import Start
from celery_capacity.platform.processes.launch import (
    DASHBOARD_PATH,
    Interrupted,
    WorkerSpec,
    await_ready,
    dashboard_url,
    start_worker,
)
from celery_capacity.platform.processes.make_servers import make_servers
from celery_capacity.platform.processes.restarts import LONGEST_PAUSE, after_end
from celery_capacity.platform.processes.running import Running
from celery_capacity.platform.processes.running_jobs import RunningJobs, summary
from celery_capacity.platform.processes.speaker import Speaker
from celery_capacity.platform.processes.supervisor import (
    COLD,
    WARM,
    Child,
    ProcessEvent,
    Step,
    Supervisor,
    celery_command,
    died,
    script_command,
)
from celery_capacity.routing.config.embedded import running_pair
from celery_capacity.routing.config.machine import detect
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import InvalidRequest, PlatformError, mask_url
from celery_capacity.routing.inspect import overview
from celery_capacity.routing.ledger import connection
from celery_capacity.routing.ledger.connection import quick_client
from celery_capacity.routing.model.amounts import (
    CPUS,
    MEMORY,
    format_cpus,
    format_memory,
    memory_to_publish,
)
from celery_capacity.routing.model.identifiers import check_worker_name
from celery_capacity.workers.app.signals import ROOT_IS_KNOWN
from celery_capacity.workers.process.stores import make_engine

#: Step that ends beat and the dashboard, which have nothing to finish; patience in seconds.
SOON = Step(WARM.signum, 10.0)


class NothingRuns(PlatformError):
    """All processes that `up` had started ended by themselves."""

    reference = "nothing-runs"
    title = "no worker runs"
    default_advice = "Their last lines are above."


@dataclass
class Member:
    """A process of `up`, which may be started again when it has ended. `due`: when, by the monotonic clock."""

    start: Callable[[], Child | None]
    worker: bool = False
    child: Child | None = None
    failures: int = 0
    due: float | None = None

    @property
    def pid(self) -> int | None:
        """Return the process's id while it lives."""
        return self.child.pid if self.child is not None and self.child.code is None else None

    @property
    def left(self) -> bool:
        """Return True if the process lives or is to be started again."""
        return self.pid is not None or self.due is not None


class LocalCluster:
    """The processes of one `up`."""

    def __init__(
        self, settings: Settings, environ: Mapping[str, str], supervisor: Supervisor, speaker: Speaker
    ) -> None:
        self._configured = settings
        self._settings = settings
        self._environ = dict(environ)
        self._supervisor = supervisor
        self._speaker = speaker
        self._beginning = Start()
        self._ready = False
        self._workers: list[Member] = []
        self._beat = Member(self._start_beat)
        self._dashboard = Member(self._start_dashboard)
        self._jobs: RunningJobs | None = None

    @property
    def embedded(self) -> bool:
        """Return True if no servers were given."""
        return self._configured.redis_url is None

    def start(self, specs: Sequence[WorkerSpec], pool: str | None = None) -> None:
        """Start all processes and wait for the workers. Raise Interrupted, NothingRuns, and the servers' errors."""
        worker_specs = specs or (self._whole(),)
        shares = [self._share(spec, worker_specs) if len(worker_specs) > 1 else {} for spec in worker_specs]
        self._warn_of_root()
        self._settings = make_servers(self._configured, self._supervisor, self._speaker, self._beginning)
        redis_url, database_url = str(self._settings.redis_url), str(self._settings.database_url)
        if self.embedded:
            # Given servers stay written as they were: a URL from a file is in no child's environment.
            self._environ |= {"REDIS_URL": redis_url, "DATABASE_URL": database_url}
        for spec, share in zip(worker_specs, shares, strict=True):
            environ = {**self._environ, **share}
            starter = partial(start_worker, self._supervisor, spec, environ, pool=pool or self._pool(spec))
            self._workers.append(Member(starter, worker=True))
        for member in self._members():
            member.child = member.start()
        awaited = [member.child for member in (*self._workers, self._dashboard) if member.child is not None]
        try:
            await_ready(self._supervisor, awaited, on_end=self._hear, waiting=self._show_waiting)
        finally:
            self._speaker.clear_status()
        if not any(worker.left for worker in self._workers):
            raise NothingRuns("no worker became ready")
        self._ready = True

    def _warn_of_root(self) -> None:
        """Say once, and not of each worker, that all of them run as root."""
        if os.geteuid() == 0:
            other = f" Postgres does not: it runs as the system user {USER}." if self.embedded else ""
            self._speaker.say(f"The workers run as root, and so do their tasks: an ordinary user is safer.{other}")
            self._environ[ROOT_IS_KNOWN] = "1"

    def _members(self) -> tuple[Member, ...]:
        return (*self._workers, self._beat, self._dashboard)

    def _show_waiting(self, late: Sequence[Child], seconds: float) -> None:
        if seconds >= 1:
            names = ", ".join(child.name for child in late)
            self._speaker.status("Waiting until everything is ready:", f"{names} ({seconds:.0f} s)")

    def _whole(self) -> WorkerSpec:
        """Return the spec of a worker with all of this machine, under the name that it would give itself."""
        name = self._settings.node_name or check_worker_name(socket.gethostname())
        return WorkerSpec(name, detect(self._settings).capacity.get(CPUS))

    def _share(self, spec: WorkerSpec, specs: Sequence[WorkerSpec]) -> dict[str, str]:
        """Return the settings that give a worker memory in proportion to its CPUs, of what others do not have.

        Otherwise each worker would publish all of the machine's memory. PLATFORM_MEMORY is meant for each worker.
        Raises InvalidRequest if nothing is left.
        """
        if self._settings.memory is not None or spec.memory is not None:
            return {}
        machine = detect(self._settings).capacity.get(MEMORY)
        left = machine - sum(other.memory or 0 for other in specs)
        if left <= 0:
            raise InvalidRequest(
                f"no memory is left for the worker {spec.name}: the others have all {format_memory(machine)}",
                value=spec.name,
                advice=f"Say its memory too: --worker {spec.name}=cpus:{format_cpus(spec.cpus)},memory:1GiB.",
            )
        share = left * spec.cpus // sum(other.cpus for other in specs if other.memory is None)
        # Whole already: the worker would round it up, and all workers together have no more than there is.
        return {"PLATFORM_MEMORY": str(memory_to_publish(share))}

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
                self._speaker.say("beat: another `up` of these servers runs it")
                return None
            command = celery_command("--quiet", "beat", "--schedule", str(schedule))
            return self._supervisor.start("beat", command, self._environ, ready="", keep_open=(lock,))

    def _start_dashboard(self) -> Child:
        return self._supervisor.start("dashboard", script_command("dashboard"), self._environ, ready=DASHBOARD_PATH)

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
        live_pids = {worker.pid for worker in self._workers}
        return Running(
            redis_url=mask_url(redis_url),
            database_url=mask_url(database_url).replace("postgresql+psycopg2://", "postgresql://", 1),
            embedded=running_pair(self._settings.home) if self.embedded else None,
            workers=tuple(worker for worker in live if worker.pid in live_pids),
            beat=self._beat.pid,
            dashboard=self._dashboard.pid,
            dashboard_url=self._dashboard_url(),
        )

    def _dashboard_url(self) -> str:
        """Return the URL that the dashboard reports, because the system may have chosen its port."""
        words = self._dashboard.child.ready_line.split() if self._dashboard.child is not None else []
        return words[-1] if words else dashboard_url(self._settings)

    def watch(self) -> None:
        """Start dying children again where that can help, until a signal (Interrupted).

        Raises NothingRuns when no worker is left.
        """
        while any(worker.left for worker in self._workers):
            dues = [member.due for member in self._members() if member.due is not None]
            event = self._supervisor.next(min(dues) - time.monotonic() if dues else None)
            if event is not None:
                self._hear(event)
            for member in self._members():
                if member.due is not None and member.due <= time.monotonic():
                    self._start_again(member)
        raise NothingRuns("no worker is left")

    def _hear(self, event: ProcessEvent) -> None:
        if event.what in ("signal", "lost"):
            raise Interrupted(event.signum)
        member = next((member for member in self._members() if member.child is event.child), None)
        if event.child is None or member is None:
            return
        if event.what == "ready":
            self._speaker.say(f"{event.child.name} is ready again (process {event.child.pid}).")
        elif event.what == "ended" and event.child.code is not None:
            verdict = after_end(
                event.child.code,
                lived=time.monotonic() - event.child.since,
                was_ready=event.child.ready,
                failures=member.failures,
                worker=member.worker,
            )
            member.failures = verdict.failures
            member.due = None if verdict.pause is None else time.monotonic() + verdict.pause
            self._speaker.say(f"{died(event.child)}. {verdict.text}")

    def _start_again(self, member: Member) -> None:
        member.due = None
        try:
            member.child = member.start()
        except OSError as error:
            name = member.child.name if member.child is not None else "beat"
            member.due = time.monotonic() + LONGEST_PAUSE
            self._speaker.say(f"{name} cannot be started: {error}. It is tried again in {LONGEST_PAUSE:g} s.")

    def end(self) -> None:
        """End the workers warm, then beat, then the dashboard. A signal in the meantime breaks running jobs off.

        Embedded servers that this start has made end too if not everything became ready.
        """
        if self._ready and any(worker.pid is not None for worker in self._workers):
            self._speaker.say(
                "Ending the workers; running jobs come to their end first (Ctrl-C again breaks them off)."
            )
        workers = [worker.child for worker in self._workers if worker.child is not None]
        try:
            self._supervisor.end(workers, (WARM, COLD), meanwhile=self._show_jobs)
        finally:
            self._speaker.clear_status()
            if self._jobs is not None:
                self._jobs.stop()
        for member in (self._beat, self._dashboard):
            if member.child is not None:
                self._supervisor.end([member.child], (SOON,))
        if self._beginning.made and not self._ready:
            self._beginning.made = not servers.stop_unused(self._settings)

    def last_line(self) -> str:
        """Return a line that says what has ended, and what stays."""
        if self._ready or not self.embedded:
            down = "; `celery -A platform down` ends them" if self.embedded else ""
            return f"Ended. The servers stay{down}."
        if self._beginning.made:
            return "Ended. The servers stay, because others use them; `celery -A platform down` ends them."
        return "Ended. Nothing that this start began runs any more."

    def _show_jobs(self, seconds: float) -> None:
        """Show the running jobs that are waited for, once the end has taken a second."""
        if not self._ready or seconds < 1:
            return
        if self._jobs is None:
            engine = make_engine(str(self._settings.database_url), timeout=self._settings.store_timeout)
            names = [worker.child.name for worker in self._workers if worker.child is not None]
            self._jobs = RunningJobs(engine, names)
            self._jobs.start()
        if self._jobs.latest:
            self._speaker.status(*summary(self._jobs.latest))


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
