"""Identity of a worker: its name, and its incarnation, which is this process."""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass, field
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


def nodename_of(settings: Settings, nodename: str) -> str:
    """Return Celery's name for a worker, from the name that Celery gave it: `-n NAME@HOST` keeps its host."""
    node, _, host = nodename.partition("@")
    has_host = host and not settings.node_name and node not in ("", DEFAULT_NODE)
    return f"{name_of(settings, nodename)}@{host if has_host else socket.gethostname()}"


def process_start(pid: int) -> datetime:
    """Return when a process started, by the wall clock of now: for people, and for nothing else."""
    return datetime.fromtimestamp(psutil.Process(pid).create_time(), UTC)


def platform_version() -> str:
    try:
        return version("celery-capacity")
    except PackageNotFoundError:
        return "0"


@dataclass(frozen=True, slots=True)
class Identity:
    """Name of a worker, and this process as a new incarnation of it.

    `incarnation` is unique. Pid space, pid and start ticks tell others on this machine whether the process is over.
    """

    name: str
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)
    hostname: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    pid_space: PidSpace = field(default_factory=lambda: process_identity.pid_space())
    start_ticks: int | None = field(default_factory=lambda: process_identity.start_ticks(os.getpid()))
    version: str = field(default_factory=platform_version)
    #: Start of the process by the wall clock, in ISO 8601.
    started_at: str = field(default_factory=lambda: process_start(os.getpid()).isoformat(timespec="milliseconds"))

    @property
    def queue(self) -> str:
        return keys.private_queue(self.name, self.incarnation)


def is_known_dead(row: WorkerRow, pid_space: PidSpace) -> bool:
    """Return True only if this machine can prove that an incarnation of a worker is over.

    The proof: it was a process of this boot, and no process has its pid and start any more. Another boot proves
    nothing: clones share the machine's id, and each has booted. A stopped process is not dead.
    """
    return pid_space.has(row.pid_space) and process_identity.is_over(row.pid, row.start_ticks)
