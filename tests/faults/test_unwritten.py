"""Postgres takes no end for longer than the ledger remembers a job otherwise: no body starts twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from routing import keys
from tests.faults.breaking import World
from tests.faults.watching import Oracle
from tests.fixtures.submitting import Submitter

#: Seconds for which an ended job is remembered, and how many of these the fault lasts.
TOMBSTONE = 4.0
TOMBSTONES = 2.5
#: Jobs that wait or are put off when the fault begins: Postgres has them as `accepted` and `scheduled`.
WAITING, PUT_OFF = 60, 30


@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    ["kill Postgres", "Postgres is read-only", "lock the table of jobs for who writes", "lock the table of jobs"],
)
def test_no_body_starts_twice_while_postgres_takes_no_end(
    world: World, submitter: Submitter, oracle: Oracle, kind: str
) -> None:
    world.platform.environment["PLATFORM_TOMBSTONE"] = str(TOMBSTONE)
    for name in ("a", "b"):
        world.start(name, ready=True)
    # (An effect is a row too: where Postgres answers and takes none, the body fails.)
    ends = ("succeeded", "failed")
    with oracle.flow(submitter, expected=ends):
        oracle.until_runs(20)
        with ThreadPoolExecutor(4) as threads:
            sent = [threads.submit(oracle.send, submitter, expected=ends, countdown=1.0) for _ in range(PUT_OFF)]
            sent += [threads.submit(oracle.send, submitter, expected=ends) for _ in range(WAITING)]
            for one in sent:
                one.result()
        with world.broken(kind, TOMBSTONES * TOMBSTONE):
            pass
        oracle.until_more(20)
    oracle.assert_zeros()
    assert world.platform.redis.xlen(keys.STREAM) == 0
