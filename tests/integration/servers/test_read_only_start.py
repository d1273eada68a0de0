"""A Postgres that only reads when a worker starts is waited for, like one that does not answer."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from celery_capacity.workers.process.waiting_for_stores import may_pass, when_stores_answer


def test_start_waits_for_a_postgres_that_only_reads(engine: Engine) -> None:
    waited: list[float] = []

    def join() -> str:
        with engine.connect() as connection, connection.begin():
            if not waited:
                connection.execute(text("SET TRANSACTION READ ONLY"))
            connection.execute(text("UPDATE authority SET epoch = epoch"))
        return "joined"

    with pytest.raises(DBAPIError) as refused:
        join()
    assert may_pass(refused.value)
    assert when_stores_answer(join, waited.append) == "joined"
    assert len(waited) == 1
