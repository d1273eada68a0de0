"""Who a worker is: its name, and which life of it (incarnation) this process is."""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import psutil

from routing import keys
from routing.names import check_worker_name
from routing.roster import WorkerRow
from routing.settings import Settings

#: Celery's own default for the part of `-n` before the @.
DEFAULT_NODE: Final = "celery"
#: Seconds by which two readings of the start of one process may differ.
START_TOLERANCE: Final = 2.0


@dataclass(frozen=True, slots=True)
class Identity:
    """`incarnation` is unique to this life; boot id, pid and start tell others on this machine whether it is over."""

    name: str
    incarnation: str
    hostname: str
    pid: int
    boot_id: str
    version: str
    started_at: str

    @property
    def queue(self) -> str:
        return keys.private_queue(self.name, self.incarnation)

    @property
    def nodename(self) -> str:
        """Celery's name for it."""
        return f"{self.name}@{self.hostname}"


def name_of(settings: Settings, nodename: str) -> str:
    """`NODE_NAME`, else the part of a given `-n` before the @, else the host name. Raises `InvalidRequest`.

    Of a `-n` without an @ Celery makes `celery@<given>`: then the given one stands for the host name.
    """
    if settings.node_name:
        return check_worker_name(settings.node_name)
    given, _, host = nodename.partition("@")
    if given and given != DEFAULT_NODE:
        return check_worker_name(given)
    return check_worker_name(host or socket.gethostname(), "host name (set NODE_NAME)")


def boot_id() -> str:
    """Which pids mean what: the kernel's id of this boot (or its time, where it has none), a colon, and the namespace
    of pids, since containers on one kernel may share a host name and not their processes."""
    path, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    boot = path.read_text().strip() if path.exists() else str(int(psutil.boot_time()))
    return f"{boot}:{namespace.readlink().name if namespace.is_symlink() else ''}"


def process_start(pid: int) -> datetime:
    return datetime.fromtimestamp(psutil.Process(pid).create_time(), UTC)


def new_identity(name: str) -> Identity:
    """This process as a new life of the worker `name`."""
    return Identity(
        name=name,
        incarnation=uuid.uuid4().hex,
        hostname=socket.gethostname(),
        pid=os.getpid(),
        boot_id=boot_id(),
        version=platform_version(),
        started_at=process_start(os.getpid()).isoformat(timespec="milliseconds"),
    )


def platform_version() -> str:
    try:
        return version("celery-capacity")
    except PackageNotFoundError:
        return "0"


def is_known_dead(row: WorkerRow, boot: str) -> bool:
    """Whether this machine can tell that a life of a worker is over: the machine booted since, or no process has
    that pid and start. Of another machine's worker nothing can be told. A stopped process is not dead."""
    if row.hostname != socket.gethostname():
        return False
    if row.boot_id != boot:
        # Another boot ended it; in another namespace of the same boot its pid cannot be looked up.
        return row.boot_id.partition(":")[0] != boot.partition(":")[0]
    try:
        process = psutil.Process(row.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        started = datetime.fromtimestamp(process.create_time(), UTC)
    except psutil.NoSuchProcess:
        return True
    return abs((started - datetime.fromisoformat(row.started_at)).total_seconds()) > START_TOLERANCE
