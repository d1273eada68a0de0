"""The clock of the ledger's server is set: what was measured by it before is no measure any more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from routing import keys
from tests.fixtures.books import open_ledger
from tests.fixtures.cluster import Cluster

HOUR_MS = 3_600_000
#: Milliseconds from the end of a lease until its worker is LOST.
GRACE_MS = 15_000


@pytest.fixture
def cluster(redis_url: str) -> Iterator[Cluster]:
    with open_ledger(redis_url) as ledger:
        cluster = Cluster(ledger)
        cluster.register()
        yield cluster


def test_a_duty_is_done_though_the_clock_was_set_back_since_its_last_turn(cluster: Cluster) -> None:
    """An expiry is a time: it comes an hour later."""
    assert cluster.ledger.take_turn("lapse", "a", 900)
    assert not cluster.ledger.take_turn("lapse", "b", 900)
    assert cluster.client.pexpire(keys.duty("lapse"), HOUR_MS)
    assert cluster.ledger.take_turn("lapse", "b", 900)
    assert not cluster.ledger.take_turn("lapse", "c", 900)


def test_what_is_submitted_is_taken_again_after_the_clock_was_set_forward(cluster: Cluster) -> None:
    """The deadline of a submit is a time by what each connection measured when it was made."""
    cluster.ledger._clock_offset_ms -= HOUR_MS
    assert cluster.submit("first") is None
    assert cluster.state("first") is None
    assert cluster.submit("first") == "w"
