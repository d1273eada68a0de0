"""Queries of one job, as commands show it."""

from __future__ import annotations

from celery_capacity.routing.store.queries import find_message
from tests.fixtures.stores.staged import Stage


def test_message_of_a_job_is_bytes_that_can_be_decoded(stage: Stage) -> None:
    job = stage.submit(cpus=1000)
    with stage.engine.connect() as connection:
        message = find_message(connection, job)
        assert isinstance(message, bytes)
        assert message
        assert find_message(connection, "nobody") is None
