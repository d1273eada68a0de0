"""Identity of a worker: its name, and its incarnation, which is this process."""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import psutil

from celery_capacity.routing.config import process_identity
from celery_capacity.routing.config.process_identity import PidSpace
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.identifiers import check_worker_name
from celery_capacity.routing.store.worker_rows import WorkerRow

#: Celery's own default for the part of `-n` before the @.
DEFAULT_NODE: Final = "celery"


@dataclass(frozen=True, slots=True)
class Identity:
    """Name and incarnation of a worker, with the facts of its process.

    `incarnation` is unique to this process. Pid space, pid and start ticks tell others on this machine whether the
    process is over.
    """

    name: str
    incarnation: str
    hostname: str
    pid: int
    pid_space: PidSpace
    start_ticks: int | None
    version: str
    started_at: str

    @property
    def queue(self) -> str:
        return keys.private_queue(self.name, self.incarnation)

    @property
    def nodename(self) -> str:
        """Return Celery's name for the worker."""
        return f"{self.name}@{self.hostname}"


def name_of(settings: Settings, nodename: str) -> str:
    """Return `NODE_NAME`, else the part of a node `-n` before the @, else the host name.

    Celery turns a `-n` without an @ into `celery@<text>`. Then that text stands for the host name. Raises
    `InvalidRequest`.
    """
    if settings.node_name:
        return check_worker_name(settings.node_name)
    node, _, host = nodename.partition("@")
    if node and node != DEFAULT_NODE:
        return check_worker_name(node)
    return check_worker_name(host or socket.gethostname(), "host name (set NODE_NAME)")


def process_start(pid: int) -> datetime:
    """Return when a process started, by the wall clock of now: for people, and for nothing else."""
    return datetime.fromtimestamp(psutil.Process(pid).create_time(), UTC)


def new_identity(name: str) -> Identity:
    """Return the identity of this process as a new incarnation of the worker `name`."""
    return Identity(
        name=name,
        incarnation=uuid.uuid4().hex,
        hostname=socket.gethostname(),
        pid=os.getpid(),
        pid_space=process_identity.pid_space(),
        start_ticks=process_identity.start_ticks(os.getpid()),
        version=platform_version(),
        started_at=process_start(os.getpid()).isoformat(timespec="milliseconds"),
    )


def platform_version() -> str:
    try:
        return version("celery-capacity")
    except PackageNotFoundError:
        return "0"


def is_known_dead(row: WorkerRow, pid_space: PidSpace) -> bool:
    """Return True only if this machine can prove that an incarnation of a worker is over.

    The proof: it was a process of this boot, and no process has its pid and start any more. Another boot proves
    nothing: clones share the machine's id, and each has booted. A stopped process is not dead.
    """
    return pid_space.has(row.pid_space) and process_identity.is_over(row.pid, row.start_ticks)
