"""A job's tenant: named by the call, the task or the process, and kept as long as the job lives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model import message
from celery_capacity.routing.model.message import HEADER
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.tasks import declared

DECLARED = declared.__name__
ONE = "cpus=1000,slots=1"


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield a platform with one worker."""
    with standing_platform(server_pair, tmp_path_factory.mktemp("tenant"), DECLARED) as running:
        running.worker("a", cpus=4, pool="threads")
        yield running


def test_call_names_the_tenant_of_its_job(platform: Platform, submitter: Submitter) -> None:
    named = submitter.ended(submitter.send(f"{DECLARED}.four", cpus=1, tenant="physics"))
    assert (named.state, named.shape) == ("succeeded", f"{ONE},$physics")
    carried = message.decode(bytes(named.message))["headers"][HEADER]
    assert carried["tenant"] == "physics"
    plain = submitter.ended(submitter.send(f"{DECLARED}.four", cpus=1, tenant="default"))
    assert (plain.state, plain.shape) == ("succeeded", ONE)
    assert "tenant" not in message.decode(bytes(plain.message))["headers"][HEADER]
    # All that was counted is given back.
    assert platform.redis.hgetall(keys.USED) == {}


@pytest.mark.parametrize("tenant", ["", "two words", "a,b", "$x", "x" * 65, 7, "na\nme"])
def test_wrong_tenant_is_refused_before_anything_is_written(submitter: Submitter, tenant: object) -> None:
    with pytest.raises(InvalidRequest, match="tenant"):
        submitter.send(f"{DECLARED}.four", tenant=tenant)
