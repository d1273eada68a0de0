"""Capacity that a worker publishes: settings first, then the tightest limit of the machine, with sources."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.config.machine import (
    Detected,
    Facts,
    Limit,
    Machine,
    check_reserved,
    default_concurrency,
    describe,
    detect,
    exceeding,
    is_whole,
    publish,
)
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import InvalidRequest, SettingsError
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.request import Request

MIB = 1024**2
GIB = 1024**3
HOST = Facts(affinity=8, machine_cpus=16, machine_memory=64 * GIB)


def lay_out(root: Path, files: dict[str, str]) -> Machine:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(root)


def test_capacity_is_affinity_and_memory_without_settings_or_limits() -> None:
    detected = publish(Settings(), HOST)
    assert detected.capacity.to_people() == {"cpus": 8, "memory": 64 * GIB, "slots": 8}
    assert detected.sources == {"cpus": "affinity", "memory": "psutil", "slots": "CPUs"}


@pytest.mark.parametrize(
    ("changes", "cpus", "source"),
    [
        ({"affinity": None}, 16_000, "psutil"),
        ({"cpu_quota": Limit(1500, "cgroup v2")}, 1500, "cgroup v2"),
        ({"cpu_quota": Limit(1500, "cgroup v1")}, 1500, "cgroup v1"),
        ({"cpu_quota": Limit(8000, "cgroup v2")}, 8000, "cgroup v2"),
        ({"cpu_quota": Limit(12_000, "cgroup v2")}, 8000, "affinity"),
        ({"cpu_quota": Limit(12_000, "cgroup v2"), "affinity": None}, 12_000, "cgroup v2"),
    ],
)
def test_the_tightest_limit_of_cpus_counts(changes: dict[str, Limit | None], cpus: int, source: str) -> None:
    detected = publish(Settings(), dataclasses.replace(HOST, **changes))  # type: ignore[arg-type]
    assert (detected.capacity.get("cpus"), detected.sources["cpus"]) == (cpus, source)


@pytest.mark.parametrize(
    ("limit", "memory", "source"),
    [
        # 8 CPUs are 8 processes in the pool: 128 MiB + 8 * 32 MiB.
        (Limit(4 * GIB, "cgroup v2"), 4 * GIB - 384 * MIB, "cgroup v2 less 384 MiB"),
        (Limit(4 * GIB, "cgroup v1"), 4 * GIB - 384 * MIB, "cgroup v1 less 384 MiB"),
        # A limit that is small for the worker itself is shared.
        (Limit(512 * MIB, "cgroup v2"), 256 * MIB, "cgroup v2 less 256 MiB"),
        (Limit(65 * GIB, "cgroup v2"), 64 * GIB, "psutil"),
    ],
)
def test_the_tightest_limit_of_memory_counts(limit: Limit, memory: int, source: str) -> None:
    detected = publish(Settings(), dataclasses.replace(HOST, memory_limit=limit))
    assert (detected.capacity.get("memory"), detected.sources["memory"]) == (memory, source)


@pytest.mark.parametrize(
    ("slots", "reserved"), [(1, 160 * MIB), (4, 256 * MIB), (1000, 384 * MIB)], ids=["one", "four", "threads"]
)
def test_worker_keeps_memory_for_each_process_of_its_pool(slots: int, reserved: int) -> None:
    """A thousand greenlets are a single process."""
    facts = dataclasses.replace(HOST, memory_limit=Limit(4 * GIB, "cgroup v2"))
    assert publish(Settings(), facts, slots).capacity.get("memory") == 4 * GIB - reserved


def test_reserved_memory_is_taken_off_the_limit_and_off_the_machine() -> None:
    settings = Settings(reserved_memory=GIB)
    limited = publish(settings, dataclasses.replace(HOST, memory_limit=Limit(4 * GIB, "cgroup v2")))
    assert (limited.capacity.get("memory"), limited.sources["memory"]) == (3 * GIB, "cgroup v2 less 1 GiB")
    whole = publish(settings, HOST)
    assert (whole.capacity.get("memory"), whole.sources["memory"]) == (63 * GIB, "psutil less 1 GiB")
    assert is_whole(whole.sources["memory"]) and not is_whole(limited.sources["memory"])
    assert publish(dataclasses.replace(settings, memory=8 * GIB), HOST).capacity.get("memory") == 8 * GIB
    facts = dataclasses.replace(HOST, memory_limit=Limit(4 * GIB, "cgroup v2"))
    assert publish(Settings(reserved_memory=0), facts).sources["memory"] == "cgroup v2"


def test_reserved_memory_that_leaves_nothing_is_refused() -> None:
    facts = dataclasses.replace(HOST, memory_limit=Limit(GIB, "cgroup v2"))
    with pytest.raises(SettingsError, match=r"PLATFORM_RESERVED_MEMORY=1073741824 leaves tasks nothing of 1 GiB"):
        check_reserved(Settings(reserved_memory=GIB), facts)
    check_reserved(Settings(reserved_memory=GIB - 1), facts)
    check_reserved(Settings(reserved_memory=GIB, memory=GIB), facts)
    # A limit that shrinks while the worker runs must not end its heartbeat.
    assert publish(Settings(reserved_memory=2 * GIB), facts).capacity.get("memory") == 0


def test_published_memory_is_whole_so_that_a_job_can_ask_for_all() -> None:
    facts = dataclasses.replace(HOST, memory_limit=Limit(4 * GIB + 4096, "cgroup v2"))
    assert publish(Settings(reserved_memory=0), facts).capacity.get("memory") == 4 * GIB
    assert publish(Settings(memory=64 * 10**9), HOST).capacity.get("memory") == 64 * 10**9


@pytest.mark.parametrize("text", ["1.1GiB", "0.7GiB", "2.3G", "1000000001", "4096", "64GB"])
def test_job_that_asks_for_the_set_memory_of_a_worker_fits(text: str) -> None:
    settings = Settings.from_environ({"PLATFORM_MEMORY": text})
    asked = Request.from_options({"memory": text}, 1000)
    assert publish(settings, HOST).capacity.get("memory") == asked.get("memory")


def test_setting_above_the_limit_of_the_cgroup_is_warned_of() -> None:
    facts = dataclasses.replace(HOST, cpu_quota=Limit(1500, "cgroup v1"), memory_limit=Limit(700 * MIB, "cgroup v1"))
    cpus, memory = exceeding(Settings(cpus=2000, memory=2 * GIB), facts)
    assert cpus.startswith("PLATFORM_CPUS promises 2 CPUs, but the cgroup v1 of this worker allows 1.5 CPUs")
    assert memory.startswith("PLATFORM_MEMORY promises 2 GiB memory, but the cgroup v1 of this worker allows 700 MiB")
    assert exceeding(Settings(cpus=1500, memory=700 * MIB), facts) == []
    assert exceeding(Settings(), facts) == []
    # Affinity and the size of the machine are no limits that end or slow down a job by surprise.
    assert exceeding(Settings(cpus=72_000, memory=512 * GIB), HOST) == []


def test_settings_override_what_was_found_and_add_what_cannot_be() -> None:
    settings = Settings(cpus=72_000, memory=GIB, gpus=2, resources={"licence": 3, "scratch": 0})
    facts = dataclasses.replace(HOST, cpu_quota=Limit(1000, "cgroup v2"))
    detected = publish(settings, facts, slots=40)
    assert detected.capacity.to_people() == {"cpus": 72, "memory": GIB, "gpus": 2, "slots": 40, "licence": 3}
    assert detected.sources == {
        "cpus": "PLATFORM_CPUS",
        "memory": "PLATFORM_MEMORY",
        "gpus": "PLATFORM_GPUS",
        "slots": "pool",
        "licence": "PLATFORM_RESOURCES",
    }


def test_the_log_line_says_each_number_and_where_it_came_from() -> None:
    settings = Settings(cpus=72_500, gpus=1, resources={"licence": 3})
    assert describe(publish(settings, HOST, 40)) == (
        "72.5 CPUs (PLATFORM_CPUS), 64 GiB memory (psutil), 1 gpu (PLATFORM_GPUS), 40 slots (pool),"
        " 3 licence (PLATFORM_RESOURCES)"
    )


@pytest.mark.parametrize(("cpus", "processes"), [(1, 1), (500, 1), (1000, 1), (2500, 3), (72_000, 72)])
def test_the_default_concurrency_is_the_cpus(cpus: int, processes: int) -> None:
    assert default_concurrency(cpus) == processes


# Reading cgroups.

V2 = {
    "proc/self/cgroup": "0::/user.slice/job.scope\n",
    "sys/fs/cgroup/user.slice/job.scope/cpu.max": "max 100000\n",
    "sys/fs/cgroup/user.slice/job.scope/memory.max": "max\n",
}


def test_version_2_counts_the_smallest_quota_up_to_the_root(tmp_path: Path) -> None:
    machine = lay_out(
        tmp_path,
        {
            **V2,
            "sys/fs/cgroup/user.slice/job.scope/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/user.slice/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/cpu.max": "800000 100000\n",
            "sys/fs/cgroup/user.slice/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/other.slice/cpu.max": "1000 100000\n",
        },
    )
    assert machine.cpu_quota() == Limit(1500, "cgroup v2")
    assert machine.memory_limit() == Limit(2 * GIB, "cgroup v2")


def test_version_2_without_limits_says_nothing(tmp_path: Path) -> None:
    machine = lay_out(tmp_path, V2)
    assert machine.cpu_quota() is None
    assert machine.memory_limit() is None


@pytest.mark.parametrize("line", ["0::/\n", "0::/../../docker/abc\n", "0::/gone/from/here\n"])
def test_in_a_container_the_mounted_root_is_the_own_group(tmp_path: Path, line: str) -> None:
    files = {
        "proc/self/cgroup": line,
        "sys/fs/cgroup/cpu.max": "50000 100000",
        "sys/fs/cgroup/memory.max": "1000000",
    }
    machine = lay_out(tmp_path, files)
    assert machine.cpu_quota() == Limit(500, "cgroup v2")
    assert machine.memory_limit() == Limit(1_000_000, "cgroup v2")


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
def test_version_1_counts_the_smallest_quota_too(tmp_path: Path, folder: str) -> None:
    base = f"sys/fs/cgroup/{folder}"
    machine = lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n",
            f"{base}/docker/abc/cpu.cfs_quota_us": "250000\n",
            f"{base}/docker/abc/cpu.cfs_period_us": "100000\n",
            f"{base}/cpu.cfs_quota_us": "-1\n",
            f"{base}/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert machine.cpu_quota() == Limit(2500, "cgroup v1")
    assert machine.memory_limit() == Limit(GIB, "cgroup v1")


def test_version_1_without_limits_says_nothing(tmp_path: Path) -> None:
    machine = lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "9:memory:/\n4:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert machine.cpu_quota() is None
    assert machine.memory_limit() is None


@pytest.mark.parametrize(
    ("text", "millicores"),
    [("33333 100000", 333), ("1 100000", 1), ("100000 0", None), ("", None), ("x y", None), ("100000", None)],
)
def test_a_quota_is_rounded_down_to_a_millicore_and_garbage_says_nothing(
    tmp_path: Path, text: str, millicores: int | None
) -> None:
    machine = lay_out(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": text})
    assert machine.cpu_quota() == (Limit(millicores, "cgroup v2") if millicores else None)


def test_a_machine_without_cgroups_says_nothing(tmp_path: Path) -> None:
    facts = Machine(tmp_path).read()
    assert (facts.cpu_quota, facts.memory_limit) == (None, None)
    assert facts.machine_memory == psutil.virtual_memory().total


def test_this_machine_publishes_what_this_process_may_use() -> None:
    capacity = detect(Settings(), slots=3).capacity
    assert 0 < capacity.get("cpus") <= len(os.sched_getaffinity(0)) * 1000
    assert 0 < capacity.get("memory") <= psutil.virtual_memory().total
    assert capacity.get("slots") == 3


def test_on_a_system_without_affinity_psutil_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert Machine().affinity() is None


# The value.


def test_a_capacity_is_a_vector_without_zeros() -> None:
    capacity = Capacity.of({"slots": 4, "cpus": 72_000, "gpus": 0})
    assert capacity.amounts == (("cpus", 72_000), ("slots", 4))
    assert (capacity.get("cpus"), capacity.get("gpus")) == (72_000, 0)
    with pytest.raises(InvalidRequest):
        Capacity.of({"Licence": 1})


@given(st.dictionaries(st.sampled_from(["cpus", "memory", "slots", "licence"]), st.integers(0, 10**9)))
def test_a_capacity_survives_its_json(amounts: dict[str, int]) -> None:
    capacity = Capacity.of(amounts)
    assert Capacity.from_people(capacity.to_people()) == capacity
    assert set(Detected(capacity, {}).capacity.to_people()) >= {"cpus"}
