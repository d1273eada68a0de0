"""Capacity of this machine: detected, or given by the settings.

Reading (`Machine`, which takes another root in tests) and deciding (`publish`, pure) are apart. psutil sees the host
and not the container, so limits of the cgroups and the CPU affinity come first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

import psutil

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import SettingsError
from celery_capacity.routing.model.amounts import (
    CPUS,
    DEFAULT_QUEUE,
    GPUS,
    MAX_AMOUNT,
    MAX_CPUS,
    MEMORY,
    MILLICORES,
    SLOTS,
    STANDARD,
    format_amount,
    memory_to_ask,
    memory_to_publish,
)
from celery_capacity.routing.model.capacity import Capacity

#: Bytes of a worker's main process, and of each process of its pool, before a task is loaded. Measured with PSS on
#: Python 3.11 to 3.13, and rounded up.
MAIN_PROCESS: Final = 128 * 2**20
POOL_PROCESS: Final = 32 * 2**20

#: cgroup v1 writes "no limit" as a number near 2^63; no machine has this much memory (bytes)
_NO_LIMIT = 2**60


@dataclass(frozen=True)
class Limit:
    """Limit of this process's cgroups: millicores or bytes, and the version of cgroups that sets it."""

    amount: int
    source: str


@dataclass(frozen=True)
class Facts:
    """Facts that were read on the machine; None where the system does not say."""

    #: CPUs that this process may run on
    affinity: int | None
    #: CPUs of the machine
    machine_cpus: int
    #: bytes of the machine
    machine_memory: int
    #: millicores
    cpu_quota: Limit | None = None
    #: bytes
    memory_limit: Limit | None = None


#: Sources of an amount that other workers of the machine publish too.
MACHINE: Final = "psutil"
AFFINITY: Final = "affinity"
WHOLE: Final = (MACHINE, AFFINITY)


def is_whole(source: str) -> bool:
    """Return True for the source of an amount that other workers of the machine publish too, less the reserved."""
    return source.partition(" ")[0] in WHOLE


@dataclass(frozen=True)
class Detected:
    """A capacity, and for each resource in it the word for the source of its number."""

    capacity: Capacity
    sources: dict[str, str]


def default_concurrency(cpus: int) -> int:
    """Return the processes of a pool for so many millicores: one for each CPU, and for a part of a CPU."""
    return max(1, -(-cpus // MILLICORES))


def needed_by_worker(processes: int) -> int:
    """Return the bytes that a worker with so many processes in its pool takes before a task takes any."""
    return MAIN_PROCESS + POOL_PROCESS * processes


def publish(settings: Settings, facts: Facts, slots: int | None = None) -> Detected:
    """Return the capacity to publish: settings first, then the tightest limit.

    A limit of a cgroup holds for the worker's own processes too, so their memory is taken off it. Memory by the setting
    is rounded as a request is, so that a job that asks for as much fits. Other memory is rounded down. `slots` None:
    `default_concurrency`.
    """
    cpus, cpus_from = _cpus(facts) if settings.cpus is None else (settings.cpus, "PLATFORM_CPUS")
    memory, memory_from = memory_to_ask(settings.memory or 0), "PLATFORM_MEMORY"
    if settings.memory is None:
        # A pool of threads or greenlets has more slots than CPUs, and a single process.
        processes = default_concurrency(cpus) if slots is None else min(slots, default_concurrency(cpus))
        memory, memory_from = _less_reserved(*_memory(facts), settings.reserved_memory, processes)
        memory = memory_to_publish(memory)
    resources = {
        CPUS: (min(cpus, MAX_CPUS * MILLICORES), cpus_from),
        MEMORY: (min(memory, MAX_AMOUNT), memory_from),
        GPUS: (settings.gpus, "PLATFORM_GPUS"),
        SLOTS: (default_concurrency(cpus), "CPUs") if slots is None else (slots, "pool"),
        **{name: (count, "PLATFORM_RESOURCES") for name, count in settings.resources.items()},
    }
    capacity = Capacity.of({name: amount for name, (amount, _) in resources.items()})
    return Detected(capacity, {name: resources[name][1] for name, _ in capacity.amounts})


def _cpus(facts: Facts) -> tuple[int, str]:
    usable, source = facts.machine_cpus, MACHINE
    if facts.affinity is not None:
        usable, source = facts.affinity, AFFINITY
    if facts.cpu_quota is not None and facts.cpu_quota.amount <= usable * MILLICORES:
        return facts.cpu_quota.amount, facts.cpu_quota.source
    return usable * MILLICORES, source


def _memory(facts: Facts) -> tuple[int, str]:
    if facts.memory_limit is not None and facts.memory_limit.amount < facts.machine_memory:
        return facts.memory_limit.amount, facts.memory_limit.source
    return facts.machine_memory, MACHINE


def _less_reserved(memory: int, source: str, reserved: int | None, processes: int) -> tuple[int, str]:
    """Return the memory that is left for tasks, and its source with the reserved amount."""
    if reserved is None:
        # Of the whole machine nothing is taken off unasked: other programs run there, and nobody knows how large.
        reserved = 0 if source == MACHINE else min(needed_by_worker(processes), memory // 2)
    if not reserved:
        return memory, source
    # In the log "6.8 GiB memory (cgroup v2 less 256 MiB)": the word for the resource is said already.
    return max(0, memory - reserved), f"{source} less {format_amount(MEMORY, reserved).removesuffix(' memory')}"


def exceeding(settings: Settings, facts: Facts) -> list[str]:
    """Return a sentence for each setting that promises more than the cgroup of this process allows."""
    sentences = []
    for env, name, promised, limit, effect in (
        ("PLATFORM_CPUS", CPUS, settings.cpus, facts.cpu_quota, "jobs get less CPU time than they asked for"),
        ("PLATFORM_MEMORY", MEMORY, settings.memory, facts.memory_limit, "the kernel kills jobs that use it"),
    ):
        if promised is not None and limit is not None and promised > limit.amount:
            sentences.append(
                f"{env} promises {format_amount(name, promised)}, but the {limit.source} of this worker allows"
                f" {format_amount(name, limit.amount)}: {effect}. Lower it, raise the limit, or leave {env} out:"
                " then the limit is published."
            )
    return sentences


def check_reserved(settings: Settings, facts: Facts) -> None:
    """Raise `SettingsError` where the reserved memory leaves none for tasks."""
    memory, source = _memory(facts)
    if settings.memory is None and settings.reserved_memory is not None and settings.reserved_memory >= memory:
        raise SettingsError(
            [
                f"PLATFORM_RESERVED_MEMORY={settings.reserved_memory} leaves tasks nothing of"
                f" {format_amount(MEMORY, memory)} ({source}). It must be less."
            ]
        )


def detect(
    settings: Settings,
    slots: int | None = None,
    machine: Machine | None = None,
    queues: Iterable[str] = (DEFAULT_QUEUE,),
) -> Detected:
    """Return the capacity that this machine, or another one, publishes with these settings, slots and queues."""
    detected = publish(settings, (machine or Machine()).read(), slots)
    return Detected(detected.capacity.serving(queues), detected.sources)


def describe(detected: Detected) -> str:
    """Return a line for the log: "72 CPUs (affinity), 62.8 GiB memory (psutil), 72 slots (pool)"; without queues."""
    amounts = {name: amount for name, amount in detected.capacity.amounts if name in detected.sources}
    names = [name for name in STANDARD if name in amounts] + [name for name in amounts if name not in STANDARD]
    return ", ".join(f"{format_amount(name, amounts[name])} ({detected.sources[name]})" for name in names)


@dataclass(frozen=True)
class Machine:
    """Reader of `Facts` from files below `root` (another one in tests). An unreadable file says nothing."""

    root: Path = field(default=Path("/"))

    def read(self) -> Facts:
        """Read all facts once."""
        return Facts(
            affinity=self.affinity(),
            machine_cpus=psutil.cpu_count() or 1,
            machine_memory=psutil.virtual_memory().total,
            cpu_quota=self.cpu_quota(),
            memory_limit=self.memory_limit(),
        )

    def affinity(self) -> int | None:
        """Return the CPUs that this process may run on; None where the system has no such call (macOS)."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None

    def cpu_quota(self) -> Limit | None:
        """Return the smallest CPU quota of this process's cgroup and those around it: each of them holds."""
        limits = [Limit(quota, "cgroup v2") for quota in map(_quota_v2, self._files("", "cpu.max")) if quota]
        for folder in self._folders("cpu"):
            quota = _number(folder / "cpu.cfs_quota_us")
            period = _number(folder / "cpu.cfs_period_us")
            if quota is not None and quota > 0 and period:
                limits.append(Limit(max(1, quota * MILLICORES // period), "cgroup v1"))
        return min(limits, key=lambda limit: limit.amount, default=None)

    def memory_limit(self) -> Limit | None:
        """Return the smallest memory limit of this process's cgroup and those around it."""
        sizes = [(_number(path), "cgroup v2") for path in self._files("", "memory.max")]
        sizes += [(_number(path), "cgroup v1") for path in self._files("memory", "memory.limit_in_bytes")]
        limits = [Limit(size, source) for size, source in sizes if size is not None and size < _NO_LIMIT]
        return min(limits, key=lambda limit: limit.amount, default=None)

    def _files(self, controller: str, name: str) -> Iterator[Path]:
        return (folder / name for folder in self._folders(controller))

    def _folders(self, controller: str) -> Iterator[Path]:
        """Yield the folders of this process's cgroup up to the mounted root; "" is the one hierarchy of version 2.

        In a container the path may be the host's, and only the root is there: missing folders say nothing.
        """
        for mount, inside in self._cgroups(controller):
            path = PurePosixPath(*(part for part in PurePosixPath(inside).parts if part not in ("/", "..")))
            for folder in (path, *path.parents):
                yield mount / folder

    def _cgroups(self, controller: str) -> Iterator[tuple[Path, str]]:
        """Yield (mounted root, path inside it), from the lines "id:controllers:path" of /proc/self/cgroup."""
        base = self.root / "sys/fs/cgroup"
        for line in _lines(self.root / "proc/self/cgroup"):
            _, _, rest = line.partition(":")
            controllers, _, inside = rest.partition(":")
            if controllers == controller == "":
                yield base, inside
            elif controller and controller in controllers.split(","):
                # The controller is mounted under all its names ("cpu,cpuacct"), and each name is a link to that.
                yield base / (controller if (base / controller).exists() else controllers), inside


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """Return the number in a file; None where there is no file, or a word ("max")."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.removeprefix("-").isdecimal() else None


def _quota_v2(path: Path) -> int | None:
    """Return the millicores of a cpu.max, rounded down; None where there is no quota.

    The file has µs of work per period in µs, such as "150000 100000".
    """
    words = "".join(_lines(path)).split()
    if len(words) != 2 or not all(word.isdecimal() for word in words) or not int(words[1]):
        return None
    return max(1, int(words[0]) * MILLICORES // int(words[1]))
