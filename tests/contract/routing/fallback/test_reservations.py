"""The runner's look at blocked jobs while Postgres decides: it reserves as the policy says, and reads little."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.fallback import reservation_rows, reservations
from celery_capacity.routing.fallback.reservations import Memory, renew_reservations
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.amounts import CPUS
from celery_capacity.routing.model.expected import UNKNOWN, RunTime, expected_class
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.policy.placement import SHAPES, Book, Waiting, fits, order
from celery_capacity.routing.policy.reservation import Held, Patience, Reservation, Rules, large_enough, renew
from celery_capacity.routing.policy.tenants import Rule
from celery_capacity.routing.store import claims, controls
from celery_capacity.workers.app.install import create_app
from celery_capacity.workers.duties import reserve
from celery_capacity.workers.process.stores import transactions
from tests.contract.routing.fallback.test_reservation_rows import EPOCH, statements, write_backlog
from tests.contract.routing.ledger.test_admission import ON_A_SERVER
from tests.fixtures.property_tests import examples
from tests.fixtures.stores.books import MOST_LOSSES
from tests.fixtures.stores.staged import Stage

TTL: Final = 60.0
LONG, LONGER = (RunTime(time, time) for time in map(expected_class, (2**20, 2**23)))
#: A head is blocked for ever before a worker is kept for it, or not at all.
TIMED, AT_ONCE = Rules(1, 10**9), Rules(1, 0)
#: Requests, capacities and times that a random cluster is made of. Times are far apart, so that none passes in a test.
REQUESTS: Final = st.builds(
    lambda cpus, memory: Request.of({"cpus": cpus, "memory": memory}),
    st.sampled_from([500, 1000, 2000, 4000]),
    st.sampled_from([0, 1, 3]),
)
TIMES: Final = st.sampled_from([UNKNOWN, LONG, LONGER])
JOBS: Final = st.lists(st.tuples(REQUESTS, st.integers(0, 2), TIMES), min_size=1, max_size=12)
CAPACITIES: Final = st.builds(
    lambda cpus, memory, slots: {"cpus": cpus, "memory": memory, "slots": slots},
    st.sampled_from([1000, 2000, 4000, 4000]),
    st.sampled_from([2, 4]),
    st.integers(1, 4),
)
#: Running jobs: the number of their worker, their request and their time.
RUNNING: Final = st.lists(st.tuples(st.integers(0, 3), REQUESTS, TIMES), max_size=8)


def write_cluster(
    connection: Connection, capacities: Sequence[dict[str, int]], running: Sequence[tuple[int, Request, RunTime]]
) -> tuple[list[Book], dict[str, list[Held]]]:
    """Write workers and the jobs that run on them, as far as these fit; return both as the policy has them."""
    books = {f"w{number}": Book(f"w{number}", capacity, {}) for number, capacity in enumerate(capacities)}
    held: dict[str, list[Held]] = {}
    connection.execute(text("DELETE FROM workers"))
    for book in books.values():
        connection.execute(
            text(
                "INSERT INTO workers (incarnation, name, cpus, memory, capacity, status, hostname, pid, boot_id,"
                " version, started_at, seen_at) VALUES (:life, :name, :cpus, 1, CAST(:capacity AS jsonb), 'ready',"
                " 'h', 7, '', '0', now(), now())"
            ),
            {
                "life": f"{book.worker}-life",
                "name": book.worker,
                "cpus": book.capacity[CPUS],
                "capacity": _json(amounts.to_people(amounts.canonical(book.capacity))),
            },
        )
    for number, (worker_number, request, run_time) in enumerate(running):
        name = f"w{worker_number % len(books)}"
        if fits(request, books[name]) is not None:
            continue
        books[name] = books[name].holding(request)
        shape = Waiting("", request, 0, run_time=run_time).shape
        since = connection.execute(
            text(
                "INSERT INTO jobs (id, name, state, epoch, attempt, step, shape, request, queue, message, worker,"
                " incarnation, started_at) VALUES (:id, 'task', 'running', 1, 1, 30, :shape, '{}', 'celery', 'message',"
                " :worker, :life, now()) RETURNING (extract(epoch FROM started_at) * 1000)::bigint"
            ),
            {"id": f"running-{number}", "shape": shape, "worker": name, "life": f"{name}-life"},
        ).scalar_one()
        held.setdefault(name, []).append(Held(request, since, run_time.expected))
    return list(books.values()), held


def _json(people: Mapping[str, Any]) -> str:
    return str(dict(people)).replace("'", '"')


def heads_of(backlog: Sequence[Waiting], books: Sequence[Book], depth: int) -> list[Waiting]:
    """Return the first jobs of the blocked shapes, as the policy defines them, where nothing is reserved yet."""
    firsts: dict[str, Waiting] = {}
    for waiting in sorted(backlog, key=lambda waiting: waiting.order):
        firsts.setdefault(waiting.shape, waiting)
    blocked = [
        waiting
        for waiting in firsts.values()
        if (able := large_enough(waiting, books))
        and not any(book.open and fits(waiting.request, book) is None for book in able)
    ]
    return blocked[:depth]


class Passed(Patience):
    """Every running job came after the head, so that all of them have passed it."""

    def since(self, head: Waiting, now: int) -> int:
        super().since(head, now)
        return 0


@pytest.mark.leaves("I1", "I2", "I6", because="rows are written that no worker and no ledger knows", sometimes=True)
@settings(ON_A_SERVER, max_examples=examples(360))
@given(JOBS, st.lists(CAPACITIES, min_size=1, max_size=4), RUNNING, st.sampled_from([1, 2, 8]), st.booleans())
def test_pass_reserves_the_workers_that_the_policy_reserves(
    engine: Engine,
    jobs: list[tuple[Request, int, RunTime]],
    capacities: list[dict[str, int]],
    running: list[tuple[int, Request, RunTime]],
    depth: int,
    kept: bool,
) -> None:
    backlog = [
        Waiting(f"job-{seq:02}", request, order(rank, seq + 1), run_time=run_time)
        for seq, (request, rank, run_time) in enumerate(jobs)
    ]
    rules = Rules(depth, 0 if kept else 10**9)
    patience: type[Patience] = Passed if kept else Patience
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        write_backlog(connection, backlog)
        books, held = write_cluster(connection, capacities, running)
        counts = renew_reservations(connection, rules, Memory(EPOCH, patience()), TTL, MOST_LOSSES)
        stand = reservation_rows.standing(connection, MOST_LOSSES)
    assert stand is not None
    written = {row.worker: row.reservation for row in stand.rows}
    oracle = renew(heads_of(backlog, books, depth), books, held, stand.now, rules, {}, patience(), {})
    assert {worker: _fixed(entry) for worker, entry in written.items() if entry} == {
        worker: _fixed(entry) for worker, entry in oracle.reservations.items()
    }
    assert counts["reserved"] == len(oracle.reservations)
    assert counts["kept"] == oracle.keepings


def _fixed(entry: Reservation) -> tuple[Any, ...]:
    """Return a reservation without the moment at which it was made."""
    return entry.worker, entry.shape, entry.order, entry.at, dict(entry.beside), bool(entry.since)


# -- single passes


@pytest.fixture
def stage(stage: Stage) -> Iterator[Stage]:
    stage.worker("a", cpus=4000)
    stage.sql("UPDATE authority SET authority = 'postgres', epoch = :epoch, changed_at = 'epoch'", epoch=EPOCH)
    yield stage
    with transactions(stage.engine).begin() as connection:
        for life in ("a-life", "b-life"):
            attempts = claims.open_attempts(connection, life)
            claims.give_back(connection, attempts, Outcome.TAKEN_BACK, "the test is over", MOST_LOSSES)
    stage.sql("UPDATE jobs SET revoked_at = now()")


def run(stage: Stage, worker: str, amounts_: Mapping[str, int], run_time: RunTime = UNKNOWN) -> str:
    """Let a worker take a new job."""
    job = stage.insert(amounts_, run_time=run_time)
    with stage.engine.connect() as connection:
        assert claims.take(connection, EPOCH, worker, f"{worker}-life", [job])
    return job


def look(stage: Stage, rules: Rules = TIMED, memory: Memory | None = None) -> dict[str, int]:
    patience = Patience() if rules.reserve_after else Passed()
    with stage.engine.connect() as connection:
        return renew_reservations(connection, rules, memory or Memory(EPOCH, patience), TTL, MOST_LOSSES)


def reserved(stage: Stage) -> dict[str, str]:
    """Return the job of each reserved worker."""
    with stage.engine.connect() as connection:
        return {row.worker: row.job for row in connection.execute(text("SELECT worker, job FROM reservations"))}


def test_job_that_is_due_is_reserved_a_worker(stage: Stage) -> None:
    run(stage, "a", {"cpus": 1000}, LONG)
    wide = stage.insert({"cpus": 4000})
    stage.sql("UPDATE jobs SET state = 'scheduled', due_at = now() - interval '1 s' WHERE id = :id", id=wide)
    assert look(stage)["reserved"] == 1
    assert reserved(stage) == {"a": wide}


def test_job_that_a_quota_holds_back_is_no_head(stage: Stage) -> None:
    run(stage, "a", {"cpus": 1000}, LONG)
    stage.insert({"cpus": 4000}, tenant="physics")
    with transactions(stage.engine).begin() as connection:
        controls.set_tenant(connection, "physics", Rule(quota={"cpus": 3000}), "ann@desk")
    assert look(stage) == {}
    with stage.engine.connect() as connection:
        controls.remove_tenant(connection, "physics", "ann@desk")
    assert look(stage)["reserved"] == 1


def test_head_behind_many_shapes_is_reserved_once_it_is_among_the_first(stage: Stage) -> None:
    run(stage, "a", {"cpus": 1000}, LONG)
    huge = [stage.insert({"cpus": 5000 + number}) for number in range(SHAPES)]
    wide = stage.insert({"cpus": 4000})
    assert look(stage) == {"reserved": 0, "overruns": 0, "kept": 0}
    stage.sql("UPDATE jobs SET revoked_at = now() WHERE id = :id", id=huge[7])
    assert look(stage)["reserved"] == 1
    assert reserved(stage) == {"a": wide}


def test_exclusive_job_is_no_head(stage: Stage) -> None:
    """No worker is kept for it while Postgres decides, and the job behind it gets its reservation."""
    run(stage, "a", {"cpus": 1000}, LONG)
    stage.insert({"cpus": 1000, "alone": 1}, place=",+exclusive")
    wide = stage.insert({"cpus": 4000})
    look(stage)
    assert reserved(stage) == {"a": wide}


def test_head_is_the_job_of_the_tenant_whose_turn_is_next(stage: Stage) -> None:
    running = stage.insert({"cpus": 1000}, run_time=LONG, tenant="art")
    wide = stage.insert({"cpus": 4000}, tenant="art")
    with stage.engine.connect() as connection:
        assert claims.take(connection, EPOCH, "a", "a-life", [running])
        assert look(stage)["reserved"] == 1
        assert reserved(stage) == {"a": wide}
        stage.insert({"cpus": 1000}, tenant="art")
        later = stage.insert({"cpus": 1000})
        # It holds up its own tenant's later jobs, and no tenant that is further below its share.
        book = Book("a", {"cpus": 4000, "slots": 8}, {"cpus": 1000, "slots": 1})
        held = reservation_rows.holding_back(connection, "a", EPOCH, MOST_LOSSES)
        chosen = claims.look(connection, book, MOST_LOSSES, (), held.reservation, held.now)
        assert [row.job for row in chosen] == [later]
    other = stage.insert({"cpus": 4000}, tenant="physics")
    stage.sql("UPDATE jobs SET revoked_at = now() WHERE id = :job", job=later)
    assert look(stage)["reserved"] == 1
    assert reserved(stage) == {"a": other}


def test_worker_that_refused_the_task_is_reserved_no_more(stage: Stage) -> None:
    stage.worker("b", cpus=4000)
    for worker in ("a", "b"):
        run(stage, worker, {"cpus": 1000}, LONG)
    wide = stage.insert({"cpus": 4000})
    memory = Memory(EPOCH)
    look(stage, TIMED, memory)
    assert reserved(stage) == {"a": wide}
    with stage.engine.connect() as connection:
        row = reservation_rows.holding_back(connection, "a", EPOCH, MOST_LOSSES).row
        assert row is not None
        assert row.head is not None
        book = Book("a", {"cpus": 4000, "slots": 4}, {}, tasks={"other"})
        assert not reservation_rows.can_hold(book, row.head)
        reservation_rows.refuse(connection, row, book)
        assert reservation_rows.holding_back(connection, "a", EPOCH, MOST_LOSSES).reservation is None
    for _ in range(2):
        look(stage, TIMED, memory)
        assert reserved(stage) == {"b": wide}


def test_worker_too_short_lived_for_a_job_is_reserved_for_a_shorter_one(stage: Stage) -> None:
    stage.worker("a", cpus=4000, left_ms=LONGER.bound + 2 * LONG.expected)
    run(stage, "a", {"cpus": 1000}, LONG)
    long = stage.insert({"cpus": 4000}, run_time=LONGER)
    memory = Memory(EPOCH)
    look(stage, TIMED, memory)
    assert reserved(stage) == {"a": long}
    with stage.engine.connect() as connection:
        row = reservation_rows.holding_back(connection, "a", EPOCH, MOST_LOSSES).row
        assert row is not None
        # The worker has less time left by its clock than by Postgres's, or the job before overran.
        left = LONGER.bound - 1
        reservation_rows.refuse(connection, row, Book("a", {"cpus": 4000, "slots": 4}, {}, left=left))
    stage.worker("a", cpus=4000, left_ms=left)
    assert look(stage, TIMED, memory) == {"reserved": 0, "overruns": 0, "kept": 0}
    assert reserved(stage) == {}
    short = stage.insert({"cpus": 4000}, run_time=LONG)
    look(stage, TIMED, memory)
    assert reserved(stage) == {"a": short}


def test_reserved_time_that_passed_is_counted_as_an_overrun(stage: Stage) -> None:
    running = run(stage, "a", {"cpus": 1000}, LONG)
    stage.insert({"cpus": 4000})
    memory = Memory(EPOCH)
    look(stage, TIMED, memory)
    stage.sql("UPDATE reservations SET starts_at = now() - interval '1 s'")
    stage.sql("UPDATE jobs SET started_at = now() - interval '1 day' WHERE id = :id", id=running)
    assert look(stage, TIMED, memory) == {"reserved": 1, "overruns": 1, "kept": 0}
    assert look(stage, TIMED, memory)["overruns"] == 0


def test_kept_worker_stays_the_same_for_the_next_runner(stage: Stage) -> None:
    run(stage, "a", {"cpus": 1000})
    wide = stage.insert({"cpus": 4000})
    assert look(stage, AT_ONCE)["kept"] == 1
    assert look(stage, TIMED) == {"reserved": 1, "overruns": 0, "kept": 0}
    assert reserved(stage) == {"a": wide}


def test_patience_begins_anew_in_another_epoch(stage: Stage) -> None:
    run(stage, "a", {"cpus": 1000})
    stage.insert({"cpus": 4000})
    memory = Memory(EPOCH, Passed())
    stage.sql("UPDATE authority SET epoch = epoch + 2")
    look(stage, AT_ONCE, memory)
    assert not isinstance(memory.patience, Passed)


def test_pass_without_a_depth_executes_nothing(stage: Stage) -> None:
    with statements(stage.engine) as noted:
        assert look(stage, Rules(0, 0)) == {}
    assert noted == []


def test_duty_without_a_depth_executes_nothing(stage: Stage, settings: Settings) -> None:
    app = create_app("reserve", resolve=lambda _: replace(settings, backfill_depth=0))
    with statements(app.platform.engine) as noted:
        assert reserve.without_ledger(app, app.platform) == {}
    assert noted == []
    app.close()


def test_pass_executes_as_much_for_many_waiting_jobs(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at the first ones, and reads the others not at all."""
    monkeypatch.setattr(reservations, "MAX_LOOKED_AT", 10)
    run(stage, "a", {"cpus": 1000}, LONG)
    stage.insert({"cpus": 4000})
    counts = []
    for _ in range(2):
        with statements(stage.engine) as noted:
            assert look(stage)["reserved"] == 1
        counts.append(len(noted))
        for _ in range(30):
            stage.insert({"cpus": 1000})
        stage.sql("DELETE FROM reservations")
    assert counts[0] == counts[1] == 6
