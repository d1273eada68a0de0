"""The stand-ins of the proposed designs: they know the taken room, and admit only jobs that fit.

An emptied stand-in forgets the taken room only where the page says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.proposals.cache import Cache
from benchmarks.proposals.columns import Columns
from benchmarks.proposals.counts import FileCounts
from benchmarks.proposals.registration import Registration
from benchmarks.proposals.sums import Sums
from benchmarks.proposals.way import ASKED, CPUS, FIT, Cluster, Way

#: Three workers: the first full, the second half full, the third empty.
CLUSTER = Cluster(3, rows=200)
ROOM = CLUSTER.workers * FIT - CLUSTER.running

WAYS = ("file", "sums", "sums, indexed", "columns", "cache", "registration")


pytestmark = pytest.mark.leaves("keys", because="a stand-in has keys of its own", sometimes=True)


@pytest.fixture
def way(request: pytest.FixtureRequest, redis_url: str, database_url: str, tmp_path: Path) -> Iterator[Way]:
    make: dict[str, Callable[[], Way]] = {
        "file": lambda: FileCounts(tmp_path / "counts.json"),
        "sums": lambda: Sums(database_url, indexed=False),
        "sums, indexed": lambda: Sums(database_url, indexed=True),
        "columns": lambda: Columns(database_url),
        "cache": lambda: Cache(redis_url),
        "registration": lambda: Registration(redis_url, database_url),
    }
    with closing(make[request.param]()) as made:
        made.load(CLUSTER)
        yield made


every_way = pytest.mark.parametrize("way", WAYS, indirect=True)


@every_way
def test_it_knows_what_is_taken_and_what_is_free_on_each_worker(way: Way) -> None:
    assert way.taken() == CLUSTER.running * ASKED
    assert way.free() == {"w0000": 0, "w0001": CPUS // 2, "w0002": CPUS}


@every_way
def test_it_admits_by_best_fit_what_there_is_room_for_and_no_more(way: Way) -> None:
    admitted = [way.admit() for _ in range(ROOM)]
    assert [held and held.worker for held in admitted] == ["w0001"] * (FIT // 2) + ["w0002"] * FIT
    assert way.admit() is None
    assert way.taken() == CLUSTER.workers * CPUS


@every_way
def test_what_is_given_back_is_free_again(way: Way) -> None:
    held = way.admit()
    assert held is not None
    way.release(held)
    assert way.free()["w0001"] == CPUS // 2
    assert way.taken() == CLUSTER.running * ASKED


@every_way
def test_callers_at_once_are_not_given_the_same_room(way: Way) -> None:
    callers = 4
    handles = [way.apart() for _ in range(callers)]
    admitted: list[str] = []

    def ask(handle: Way) -> None:
        while held := handle.admit():
            admitted.append(held.worker)

    threads = [threading.Thread(target=ask, args=[handle]) for handle in handles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.close()
    # A way may give up early when others have locked all its candidates; no way overcommits.
    assert len(admitted) <= ROOM
    while way.admit():
        admitted.append("the last ones")
    assert len(admitted) == ROOM
    assert way.taken() == CLUSTER.workers * CPUS


def admit_all(way: Way) -> int:
    admitted = 0
    while way.admit():
        admitted += 1
    return admitted


@pytest.mark.parametrize(
    ("way", "overcommitted"),
    [("file", True), ("cache", True), ("sums", False), ("columns", False), ("registration", False)],
    indirect=["way"],
)
def test_only_a_way_without_truth_overcommits_when_it_was_emptied(way: Way, overcommitted: bool) -> None:
    way.empty()
    admitted = admit_all(way)
    admitted += way.recover() + admit_all(way)
    assert admitted == (CLUSTER.workers * FIT if overcommitted else ROOM)
