"""The overview comes from the ledger, else from Postgres, and both give the same."""

from __future__ import annotations

from typing import Any, cast

import pytest
import redis
from sqlalchemy import create_engine

from celery_capacity.routing.errors import NotMigrated, StoreUnavailable
from celery_capacity.routing.inspect import overview, verify
from celery_capacity.routing.inspect.worker_lines import Page
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.connection import quick_client
from tests.fixtures.stores.books import job_field
from tests.fixtures.stores.staged import Stage


def _ledger(stage: Stage) -> dict[str, Any]:
    return overview.from_ledger(stage.redis).to_json()


def _postgres(stage: Stage) -> dict[str, Any]:
    with stage.engine.connect() as connection:
        return overview.from_postgres(connection).to_json()


def test_both_stores_tell_the_same(stage: Stage) -> None:
    stage.worker("a", cpus=4000, licence=2)
    stage.worker("b", cpus=2000)
    first = stage.submit(cpus=1500, memory=1024)
    stage.submit(cpus=1000, licence=1)
    stage.start(first)
    for _ in range(3):
        stage.submit(cpus=8000)
    ledger, postgres = _ledger(stage), _postgres(stage)
    assert (ledger.pop("source"), postgres.pop("source")) == ("ledger", "postgres")
    assert ledger.pop("counters")["admitted"] == 2
    assert postgres.pop("counters") == {}
    for shown in (ledger, postgres):
        assert shown["resources"]["allocated_cpus"] == 2.5
        assert [(line["request"], line["waiting"]) for line in shown.pop("backlog")] == [({"cpus": 8, "slots": 1}, 3)]
        for worker in shown["workers"]:
            assert 0 <= worker.pop("heartbeat_age_seconds") < 10
            worker.pop("started_at")
        shown.pop("at")
        shown.pop("unapplied")
        shown.pop("unapplied_seconds")
    assert ledger == postgres


def test_the_number_of_round_trips_does_not_grow(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    trips: list[object] = []
    send: Any = redis.Connection.send_packed_command

    def counted(connection: Any, command: Any, *args: Any, **kwargs: Any) -> Any:
        trips.append(command)
        return send(connection, command, *args, **kwargs)

    overview.from_ledger(stage.redis)
    monkeypatch.setattr(redis.connection.AbstractConnection, "send_packed_command", counted)
    taken = []
    for workers in (1, 20):
        for number in range(workers):
            stage.worker(f"w{number}", cpus=1000)
            stage.submit(cpus=1_000_000 + number)
        trips.clear()
        assert overview.from_ledger(stage.redis).total("cpus") == workers * 1000
        taken.append(len(trips))
    assert taken == [3, 3]


def test_the_oldest_job_of_a_request_is_found_whatever_its_priority(stage: Stage) -> None:
    low = stage.submit(cpus=1000)
    stage.submit(cpus=1000, priority=9)
    submitted = job_field(stage.redis, low, "submitted") or b""
    older = str(int(submitted) - 60_000).encode()
    stage.redis.set(keys.job(low), cast(bytes, stage.redis.get(keys.job(low))).replace(submitted, older))
    (line,) = overview.from_ledger(stage.redis).backlog
    assert line.waiting == 2
    assert line.oldest is not None
    assert 60 <= line.oldest < 70


def test_a_worker_whose_lease_ran_out_is_not_counted(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.worker("b", cpus=2000)
    stage.ledger.expire_lease("a", "a-life")
    assert [line.name for line in overview.from_ledger(stage.redis).workers] == ["b"]
    stage.sql("UPDATE workers SET seen_at = now() - interval '61 s' WHERE name = 'a'")
    with stage.engine.connect() as connection:
        assert [line.name for line in overview.from_postgres(connection).workers] == ["b"]


def test_a_page_of_workers_has_the_totals_of_all(stage: Stage) -> None:
    for name in ("c", "a", "b"):
        stage.worker(name, cpus=2000)
    nobody = quick_client(redis.Redis(port=1))
    names, after = [], ""
    while True:
        page = Page(2, after)
        ledger, postgres = overview.from_ledger(stage.redis, page), overview.read(nobody, stage.engine, page=page)
        assert (ledger.source, postgres.source) == ("ledger", "postgres")
        shown = ledger.to_json()
        assert shown["resources"]["total_cpus"] == 6
        assert [row["name"] for row in shown["workers"]] == [row.name for row in postgres.shown[0]]
        assert all(row["heartbeat_age_seconds"] is not None for row in shown["workers"])
        names += [row["name"] for row in shown["workers"]]
        if shown["next_after"] is None:
            break
        after = shown["next_after"]
    assert (names, after) == (["a", "b", "c"], "b")


def test_every_page_has_the_sums_and_reasons_of_the_whole(stage: Stage) -> None:
    for number in range(6):
        stage.worker(f"w{number}", cpus=4000 + number % 2 * 1000, memory=2**30)
    stage.worker("w6", cpus=1000, licence=2)
    stage.worker("w7", cpus=8000)
    for cpus, memory in ((4500, 1024), (1500, 4096), (3000, 0), (1000, 0)):
        stage.submit(cpus=cpus, memory=memory)
    stage.submit(cpus=500, licence=1)
    for amount in (9000, 7000):
        stage.submit(cpus=amount)
    stage.submit(licence=3)
    for worker in ("w0", "w3"):
        stage.submit(cpus=4800, place=f",?@{worker}")
    stage.ledger.drain("w1", "w1-life")
    stage.ledger.expire_lease("w7", "w7-life")
    closed, torn = keys.book("w5"), keys.book("w4")
    stage.redis.hset(closed, "status", "closed")
    stage.redis.hdel(torn, "epoch")
    whole = _ledger(stage)
    assert whole["resources"]["active_workers"] == 5
    for limit in range(5):
        for after in ("", "w1", "w3", "w9"):
            page = Page(limit, after)
            shown = overview.from_ledger(stage.redis, page)
            behind = [line for line in whole["workers"] if line["name"] > after]
            document = shown.to_json()
            assert [line["name"] for line in document["workers"]] == [line["name"] for line in behind[:limit]]
            assert document["next_after"] == (behind[limit - 1]["name"] if 0 < limit < len(behind) else None)
            for part in ("resources", "backlog"):
                assert _without_ages(document[part]) == _without_ages(whole[part])
            assert (shown.resources, shown.total("cpus")) == (["licence"], 19_000)
            assert shown.utilization_percent == whole["resources"]["utilization_percent"]
            assert len(shown.workers) == min(limit, len(behind))
    stage.redis.hset(closed, "status", "ready")
    stage.redis.hset(torn, "epoch", stage.ledger.epoch)


def _without_ages(part: Any) -> Any:
    if isinstance(part, list):
        return [{name: value for name, value in line.items() if name != "oldest_seconds"} for line in part]
    return part


def test_a_draining_worker_counts_and_says_so(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.ledger.drain("a", "a-life")
    (line,) = overview.from_ledger(stage.redis).workers
    assert line.status == "draining"


def test_of_two_lives_of_a_worker_postgres_counts_the_newer(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.sql(
        "INSERT INTO workers (incarnation, name, cpus, memory, capacity, status, hostname, pid, boot_id, version,"
        " started_at, seen_at, left_at) SELECT 'older', name, 1000, memory, '{\"cpus\": 1}', status, hostname, pid,"
        " boot_id, version, started_at - interval '1 s', seen_at, left_at FROM workers"
    )
    with stage.engine.connect() as connection:
        assert overview.from_postgres(connection).total("cpus") == 4000


def test_a_cold_ledger_is_answered_for_by_postgres(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.redis.flushdb()
    with pytest.raises(overview.Cold):
        overview.from_ledger(stage.redis)
    seen = overview.read(quick_client(stage.redis), stage.engine)
    assert (seen.source, seen.total("cpus")) == ("postgres", 4000)


def test_a_ledger_opened_in_another_life_of_the_server_is_cold(stage: Stage) -> None:
    stage.redis.hset(keys.EPOCH, "run_id", "another")
    with pytest.raises(overview.Cold):
        overview.from_ledger(stage.redis)


def test_without_redis_postgres_answers_and_says_so(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    nobody = quick_client(redis.Redis(port=1))
    assert overview.read(nobody, stage.engine).source == "postgres"


def test_without_both_the_error_names_both(stage: Stage) -> None:
    nobody = quick_client(redis.Redis(port=1))
    closed = create_engine("postgresql+psycopg2://me:secret@127.0.0.1:1/platform")
    with pytest.raises(StoreUnavailable, match=r"ledger does not answer \(.*refused.*Postgres does not answer"):
        overview.read(nobody, closed)


def test_without_redis_and_without_tables_the_error_says_what_to_run(stage: Stage) -> None:
    stage.sql("DROP TABLE workers")
    with pytest.raises(NotMigrated, match="db upgrade"):
        overview.read(quick_client(redis.Redis(port=1)), stage.engine)


@pytest.mark.leaves("I6", because="a key for people is deleted")
def test_reads_of_the_allocated_cpus_say_how_many_redis_answered(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=1500)
    reads = overview.read_allocated(stage.redis, stage.engine, 100)
    assert (reads.value, reads.answered, reads.share_percent) == ("1.5", 100, 100)
    stage.redis.delete(keys.ALLOCATED_CPUS)
    reads = overview.read_allocated(stage.redis, stage.engine, 100)
    assert (reads.value, reads.answered, reads.share_percent) == ("1.5", 0, 0)


def test_pool_without_a_free_connection_is_a_store_that_does_not_answer(stage: Stage) -> None:
    nowhere = quick_client(redis.Redis(port=1))
    engine = create_engine(stage.engine.url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    with engine.connect():
        for look in (
            lambda: overview.read(nowhere, engine),
            lambda: overview.read_allocated(nowhere, engine, 1),
            lambda: verify.check(engine, stage.redis),
        ):
            with pytest.raises(StoreUnavailable, match="no connection to Postgres was free"):
                look()
    engine.dispose()
