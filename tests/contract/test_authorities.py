"""The rules of admission, of attempts and of their ends: the same cases over the ledger and over Postgres.

`test_authorities_attempts.py` goes on with attempts that come again. Where the two stores differ on purpose,
`DIFFERENCES` says how and why. `OF_ONE_STORE` names the files whose cases only one store can have, with the reason.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.expected import UNKNOWN, RunTime
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request, alternatives_term
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.pauses import Scope
from celery_capacity.routing.store import controls as stored_controls
from celery_capacity.workers.client import controls, priorities
from celery_capacity.workers.client.tenants import set_tenant
from tests.fixtures.stores.authorities import Authority

# -- who starts


def test_jobs_start_by_priority_and_then_by_submission(authority: Authority) -> None:
    jobs = [authority.submit(cpus=1000, priority=priority) for priority in (0, 5, 9, 5, 0)]
    authority.worker("a", cpus=5000)
    assert authority.starts("a") == [jobs[place] for place in (2, 1, 3, 0, 4)]


def test_job_that_does_not_fit_holds_up_no_other(authority: Authority) -> None:
    wide, slim = authority.submit(cpus=3000, priority=9), authority.submit(cpus=1000)
    authority.worker("a", cpus=2000)
    assert authority.starts("a") == [slim]
    assert authority.waits(wide)


@pytest.mark.parametrize("short", ["cpus", "memory", "slots", "gpus"])
def test_worker_needs_room_for_each_resource_of_a_request(authority: Authority, short: str) -> None:
    amounts: dict[str, Any] = {"cpus": 1000, "memory": 100, "slots": 1, "gpus": 1}
    job = authority.submit(**amounts)
    authority.worker("a", **{**amounts, short: amounts[short] - 1})
    assert authority.starts("a") == []
    authority.worker("b", **amounts)
    assert authority.starts("b") == [job]
    assert authority.allocated("b") == amounts


def test_worker_takes_jobs_of_the_queues_that_it_serves(authority: Authority) -> None:
    mail, plain = (authority.submit(cpus=1000, queue=queue) for queue in ("mail", "celery"))
    authority.worker("a", cpus=4000, queues=["video"])
    assert authority.starts("a") == []
    authority.worker("b", cpus=4000, queues=["mail"])
    assert authority.starts("b") == [mail]
    authority.worker("c", cpus=4000, queues=["celery", "mail"])
    assert authority.starts("c") == [plain]


def test_job_is_started_by_a_worker_that_lives_long_enough(authority: Authority) -> None:
    minute, hour = 60_000, 3_600_000
    long, short, unknown, limited = (
        authority.submit(cpus=1000, run_time=run_time)
        for run_time in (RunTime(hour, hour), RunTime(minute, minute), UNKNOWN, RunTime(minute, hour))
    )
    authority.worker("a", cpus=4000, left_ms=hour // 2)
    assert authority.starts("a") == [short, unknown]
    assert authority.waits(long) and authority.waits(limited)
    assert authority.end(short) == "released"
    assert authority.starts("a") == []
    authority.worker("b", cpus=4000, left_ms=2 * hour)
    assert authority.starts("b") == [long, limited]
    assert authority.end(long) == "released"


def test_job_at_its_last_chance_runs_alone_on_its_worker(authority: Authority) -> None:
    authority.worker("a", cpus=4000)
    last = authority.submit(cpus=1000, losses=2)
    other = authority.submit(cpus=1000)
    assert authority.starts("a") == [last]
    assert authority.allocated("a") == {"cpus": 1000, "slots": 1, "alone": 1}
    authority.end(last)
    assert authority.starts("a") == [other]
    again = authority.submit(cpus=1000, losses=2)
    assert authority.starts("a") == [], "another job runs there"
    authority.end(other)
    assert authority.starts("a") == [again]


def test_scheduled_job_starts_at_its_time_and_not_before(authority: Authority) -> None:
    authority.worker("a", cpus=4000)
    job = authority.submit(cpus=1000, due_in=3600)
    authority.duty()
    assert authority.starts("a") == []
    authority.stage.sql("UPDATE jobs SET due_at = now()")
    authority.duty()
    assert authority.starts("a") == [job]


def test_expired_job_ends_without_a_start(authority: Authority) -> None:
    late, in_time = (authority.submit(cpus=1000, due_in=60, expires_in=seconds) for seconds in (120, 3600))
    authority.stage.sql("UPDATE jobs SET due_at = now(), expires_at = expires_at - interval '10 minutes'")
    authority.worker("a", cpus=4000)
    assert authority.duty()["expired"] == 1
    assert authority.starts("a") == [in_time]
    assert authority.row(late).state == "expired"


def test_draining_worker_starts_nothing_and_ends_its_jobs(authority: Authority) -> None:
    authority.worker("a", cpus=2000)
    job = authority.submit(cpus=1000)
    assert authority.starts("a") == [job]
    authority.drain("a")
    after = authority.submit(cpus=1000)
    assert authority.starts("a") == []
    assert authority.end(job) == "released"
    assert authority.starts("a") == []
    authority.worker("b", cpus=2000)
    assert authority.starts("b") == [after]


@pytest.mark.parametrize("seed", range(3))
def test_no_worker_is_ever_allocated_above_its_capacity(authority: Authority, seed: int) -> None:
    """A job that starts twice, or that nobody takes though there is room, shows too."""
    chance = random.Random(seed)
    capacity: dict[str, Any] = {"cpus": 4000, "memory": 400, "slots": 3}
    workers = ("a", "b", "c")
    for worker in workers:
        authority.worker(worker, **capacity)
    running: dict[str, str] = {}
    jobs = []
    for _ in range(60):
        if not running or chance.random() < 0.6:
            jobs.append(authority.submit(cpus=500 * chance.randint(1, 5), memory=chance.randint(0, 250)))
        else:
            job = chance.choice(sorted(running))
            del running[job]
            outcome = chance.choice(("succeeded", "failed", "handed_back", "lost"))
            assert authority.end(job, outcome) == "released"
        for worker in chance.sample(workers, 3):
            for job in authority.starts(worker):
                assert job not in running
                running[job] = worker
        for worker in workers:
            assert all(used <= capacity.get(name, 1) for name, used in authority.allocated(worker).items())
    while running:
        assert authority.end(running.popitem()[0]) == "released"
        for worker in workers:
            running |= dict.fromkeys(authority.starts(worker), worker)
    assert {authority.row(job).state for job in jobs} <= {"succeeded", "failed", "lost"}
    assert [authority.allocated(worker) for worker in workers] == [{}, {}, {}]


# -- whose attempt it is


def test_job_is_claimed_once(authority: Authority) -> None:
    authority.worker("a", cpus=4000)
    job = authority.submit(cpus=1000)
    assert authority.starts("a") == [job]
    assert not authority.claims("a", job)
    authority.end(job)
    assert not authority.claims("a", job)
    assert authority.row(job).attempt == 1


def test_release_admits_next_job_of_same_shape(authority: Authority) -> None:
    authority.worker("a", cpus=1000)
    first, second = authority.submit(cpus=1000), authority.submit(cpus=1000)
    assert authority.starts("a") == [first]
    assert authority.starts("a") == []
    authority.end(first)
    assert authority.starts("a") == [second]
    assert authority.allocated("a") == {"cpus": 1000, "slots": 1}


@pytest.mark.parametrize(
    ("outcome", "losses", "rerun", "state", "losses_after"),
    [
        ("succeeded", 1, True, "succeeded", 1),
        ("failed", 0, True, "failed", 0),
        ("cancelled", 0, True, "cancelled", 0),
        ("expired", 0, True, "expired", 0),
        pytest.param(
            *("replaced", 0, True, "replaced", 0),
            marks=pytest.mark.leaves("I2", because="no step of the replacement was submitted", sometimes=True),
        ),
        ("retried", 1, True, "scheduled", 1),
        ("requeued", 1, True, "scheduled", 1),
        ("handed_back", 1, False, "waits", 1),
        ("lost", 0, True, "waits", 1),
        ("lost", 2, True, "lost", 3),
        ("lost", 0, False, "lost", 1),
    ],
)
def test_end_of_an_attempt_makes_its_job_what_the_table_says(
    authority: Authority, outcome: str, losses: int, rerun: bool, state: str, losses_after: int
) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000, losses=losses, rerun=rerun)
    assert authority.starts("a") == [job]
    authority.drain("a")
    assert authority.end(job, outcome) == "released"
    row = authority.row(job)
    assert ("waits" if authority.waits(job) else row.state, row.losses) == (state, losses_after)
    assert authority.allocated("a") == {}


@pytest.mark.parametrize("outcome", ["succeeded", "failed", "cancelled", "expired", "retried", "requeued"])
def test_end_that_is_sent_again_is_a_repeat(authority: Authority, outcome: str) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000)
    authority.starts("a")
    assert authority.end(job, outcome) == "released"
    state = authority.row(job).state
    assert authority.end(job, outcome) == "repeat"
    assert authority.row(job).state == state


def test_job_that_puts_itself_back_goes_behind_those_that_wait(authority: Authority) -> None:
    authority.worker("a", cpus=1000)
    first, second, third = (authority.submit(cpus=1000) for _ in range(3))
    low = authority.submit(cpus=1000, priority=0)
    assert authority.starts("a") == [first]
    assert authority.end(first, "requeued") == "released"
    authority.duty()
    order = []
    for _ in range(4):
        order += authority.starts("a")
        authority.end(order[-1])
    assert order == [second, third, low, first]
    assert [authority.row(job).attempt for job in order] == [1, 1, 1, 2]


def test_job_that_puts_itself_back_again_waits_longer_each_time(authority: Authority) -> None:
    authority.worker("a", cpus=1000)
    # A lost attempt is no reason for a pause.
    job = authority.submit(cpus=1000)
    authority.starts("a")
    authority.lose("a")
    authority.worker("b", cpus=1000)
    pauses = []
    for _ in range(4):
        assert authority.starts("b") == [job]
        authority.end(job, "requeued")
        pauses.append(authority.seconds_left(job))
        authority.make_due(job)
        authority.duty()
    assert pauses == [pytest.approx(seconds, abs=0.4) for seconds in (0, 1, 2, 4)]


def test_attempts_that_were_handed_back_are_no_reason_for_a_pause(authority: Authority) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000)
    pauses = []
    for outcome in ("handed_back", "handed_back", "requeued", "handed_back", "requeued"):
        assert authority.starts("a") == [job]
        authority.end(job, outcome)
        if outcome == "requeued":
            pauses.append(authority.seconds_left(job))
            authority.make_due(job)
            authority.duty()
    assert pauses == [pytest.approx(seconds, abs=0.4) for seconds in (0, 1)]


def test_worker_cannot_end_the_attempt_of_another(authority: Authority) -> None:
    authority.worker("a", cpus=1000)
    authority.worker("b", cpus=500)
    job = authority.submit(cpus=1000)
    assert authority.starts("a") == [job]
    assert authority.end(job, worker="b") == "stale"
    assert authority.row(job).state == "running"
    assert authority.allocated("a") == {"cpus": 1000, "slots": 1}


@pytest.mark.parametrize(
    ("losses", "rerun", "state"), [(0, True, "running"), (1, True, "running"), (2, True, "lost"), (0, False, "lost")]
)
def test_job_of_a_lost_worker_runs_elsewhere_or_is_lost(
    authority: Authority, losses: int, rerun: bool, state: str
) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000, losses=losses, rerun=rerun)
    assert authority.starts("a") == [job]
    authority.lose("a")
    authority.lose("a")
    authority.worker("b", cpus=1000)
    assert authority.starts("b") == ([job] if state == "running" else [])
    row = authority.row(job)
    assert (row.state, row.losses) == (state, losses + 1)
    authority.wake("a")
    assert authority.end(job, worker="a", token=Token(row.epoch, 1)) != "released"
    assert authority.row(job).state == state


def test_job_holds_one_alternative_and_waits_for_all_again(authority: Authority) -> None:
    terms = alternatives_term([Request.of({"cpus": 1000, "gpus": 1}), Request.of({"cpus": 2000})])
    authority.worker("a", cpus=2000)
    job = authority.submit(cpus=1000, gpus=1, terms=terms)
    assert authority.starts("a") == [job]
    assert authority.allocated("a") == {"cpus": 2000, "slots": 1}
    authority.lose("a")
    authority.lose("a")
    row = authority.row(job)
    assert (row.shape, row.request) == (f"cpus=1000,gpus=1,slots=1{terms}", {"cpus": 1, "gpus": 1, "slots": 1})
    authority.worker("b", cpus=1000, gpus=1)
    assert authority.starts("b") == [job]
    assert authority.allocated("b") == {"cpus": 1000, "gpus": 1, "slots": 1}
    row = authority.row(job)
    assert (row.shape.split(",|")[0], row.request["gpus"]) == ("cpus=1000,gpus=1,slots=1", 1)
    assert authority.end(job, worker="b") == "released"
    assert authority.row(job).state == "succeeded"


def test_quota_leaves_the_alternatives_that_it_allows(authority: Authority) -> None:
    set_tenant(authority.stores, "physics", {"quota": {"gpus": 1}})
    terms = alternatives_term([Request.of({"cpus": 1000, "gpus": 1}), Request.of({"cpus": 2000})]) + ",$physics"
    authority.worker("a", cpus=5000, gpus=3)
    jobs = [authority.submit(cpus=1000, gpus=1, terms=terms) for _ in range(4)]
    assert authority.starts("a") == jobs[:3]
    assert authority.allocated("a") == {"cpus": 5000, "gpus": 1, "slots": 3}
    authority.end(jobs[1])
    assert authority.starts("a") == [jobs[3]]
    assert authority.allocated("a") == {"cpus": 5000, "gpus": 1, "slots": 3}
    authority.end(jobs[0])
    last = authority.submit(cpus=1000, gpus=1, terms=terms)
    assert authority.starts("a") == [last]
    assert authority.allocated("a") == {"cpus": 5000, "gpus": 1, "slots": 3}


def test_attempt_that_went_back_cannot_end_the_next_one(authority: Authority) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000)
    authority.starts("a")
    first = Token(authority.row(job).epoch, 1)
    authority.end(job, "handed_back")
    assert authority.starts("a") == [job]
    assert authority.row(job).attempt == 2
    assert authority.end(job, token=first) == "stale"
    assert authority.end(job) == "released"


# -- what is revoked


def test_revoked_job_that_waits_never_starts(authority: Authority) -> None:
    job, other = authority.submit(cpus=1000), authority.submit(cpus=1000)
    authority.revoke(job)
    assert authority.row(job).state == "cancelled"
    authority.worker("a", cpus=4000)
    assert authority.starts("a") == [other]


@pytest.mark.parametrize("outcome", ["handed_back", "lost", "retried", "requeued"])
def test_revoked_job_that_comes_back_ends(authority: Authority, outcome: str) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000)
    authority.starts("a")
    authority.revoke(job)
    assert authority.row(job).state == "running"
    assert authority.end(job, outcome) == "released"
    row = authority.row(job)
    assert (row.state, row.error, row.attempt) == ("cancelled", "revoked", 1)
    assert authority.starts("a") == []


@pytest.mark.parametrize("outcome", ["succeeded", "failed"])
def test_revoked_job_whose_body_ends_all_the_same_has_its_own_end(authority: Authority, outcome: str) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000)
    authority.starts("a")
    authority.revoke(job)
    authority.end(job, outcome)
    authority.revoke(job)
    assert authority.row(job).state == outcome


def test_revoked_job_of_a_lost_worker_ends(authority: Authority) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000)
    authority.starts("a")
    authority.revoke(job)
    authority.lose("a")
    authority.worker("b", cpus=1000)
    assert authority.starts("b") == []
    assert (authority.row(job).state, authority.row(job).error) == ("cancelled", "revoked")


# -- why


def test_reason_is_that_of_the_row_where_the_row_says_all(authority: Authority) -> None:
    authority.worker("a", cpus=1000)
    job, later = authority.submit(cpus=1000), authority.submit(cpus=1000, due_in=3600)
    authority.starts("a")
    assert (authority.why(job), authority.why(later)) == (Reason.RUNS, Reason.SCHEDULED)
    authority.end(job)
    assert authority.why(job) is Reason.ENDED


# -- where the two differ on purpose


@dataclass(frozen=True)
class Difference:
    """A behaviour that depends on the store that decides. `observe` returns what a cluster does."""

    because: str
    observe: Callable[[Authority], Any]
    ledger: Any
    postgres: Any


def worker_of_a_job_that_fits_two(authority: Authority) -> str:
    authority.worker("a", cpus=4000)
    authority.worker("b", cpus=1000)
    job = authority.submit(cpus=1000)
    for worker in ("a", "b"):
        authority.starts(worker)
    return str(authority.row(job).worker)


def starts_beside_a_job_that_must_be_alone(authority: Authority) -> int:
    authority.worker("a", cpus=3000)
    running = [authority.submit(cpus=1000), authority.submit(cpus=1000)]
    assert authority.starts("a") == running
    authority.submit(cpus=1000, losses=2)
    authority.end(running[0])
    authority.starts("a")
    authority.submit(cpus=1000)
    return len(authority.starts("a"))


def states_of_a_job_with_room_and_of_one_without(authority: Authority) -> tuple[str, str]:
    authority.worker("a", cpus=1000)
    slim, wide = authority.submit(cpus=1000), authority.submit(cpus=2000)
    return authority.row(slim).state, authority.row(wide).state


def reason_of_a_job_that_is_too_large(authority: Authority) -> Reason:
    authority.worker("a", cpus=1000)
    return authority.why(authority.submit(cpus=2000))


def verdict_on_another_outcome_of_an_attempt_that_ended(authority: Authority) -> str:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000)
    authority.starts("a")
    authority.end(job, "failed")
    verdict = authority.end(job, "succeeded")
    assert authority.row(job).state == "failed"
    return verdict


DIFFERENCES: Final = {
    "best fit": Difference(
        "the ledger knows the books of all workers, and a worker that pulls knows its own",
        worker_of_a_job_that_fits_two,
        ledger="b",
        postgres="a",
    ),
    "a worker is kept": Difference(
        "every worker that pulls would be kept for the job, since none knows of the others",
        starts_beside_a_job_that_must_be_alone,
        ledger=0,
        postgres=1,
    ),
    "states before the start": Difference(
        "Postgres admits and claims in one statement, and no list of waiting jobs is kept beside the rows",
        states_of_a_job_with_room_and_of_one_without,
        ledger=("admitted", "waiting"),
        postgres=("accepted", "accepted"),
    ),
    "why a job waits": Difference(
        "there are no books to explain it by",
        reason_of_a_job_that_is_too_large,
        ledger=Reason.TOO_LARGE,
        postgres=Reason.LEDGER_STANDS_BACK,
    ),
    "another outcome": Difference(
        "a row does not say by which outcome its attempt ended, and either way nothing is written",
        verdict_on_another_outcome_of_an_attempt_that_ended,
        ledger="stale",
        postgres="repeat",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference_is_the_one_that_the_table_names(authority: Authority, name: str) -> None:
    difference = DIFFERENCES[name]
    assert difference.observe(authority) == getattr(difference, authority.name), difference.because


def test_table_holds_nothing_in_which_both_agree() -> None:
    assert [name for name, difference in DIFFERENCES.items() if difference.ledger == difference.postgres] == []


# -- cases that only one store can have

LEDGER = "tests/contract/routing/ledger"
STORE = "tests/contract/routing/store"
SETTLE = "tests/contract/workers/settle"
OF_ONE_STORE: Final = {
    f"{LEDGER}/test_admission.py": "the ledger chooses among all workers; a worker that pulls chooses for itself",
    f"{LEDGER}/test_alone.py": "only the ledger keeps a worker for a job, since it knows the books of all",
    f"{LEDGER}/test_books.py": "books can be lost, torn, reserved and closed; Postgres adds up rows instead",
    f"{LEDGER}/test_books_by_model.py": "a model of the books and of their indexes",
    f"{LEDGER}/test_concurrency.py": "scripts run one after another; rows are locked instead (test_locked_rows.py)",
    f"{LEDGER}/test_full.py": "Redis has a limit of memory",
    f"{LEDGER}/test_held_jobs.py": "scripts go through long lists in pages; one statement sees all rows",
    f"{LEDGER}/test_indexes.py": "places in sorted sets, which may be damaged",
    f"{LEDGER}/test_leases.py": "claims of messages, lists of heartbeats, results in Redis: Postgres has no messages",
    f"{LEDGER}/test_script_bounds.py": "a script stops the whole server while it runs",
    f"{LEDGER}/test_script_costs.py": "a script stops the whole server while it runs",
    f"{LEDGER}/test_signatures.py": "scripts and their headers",
    f"{LEDGER}/test_tombstones.py": "an ended job is forgotten; a row stays",
    f"{STORE}/test_claims.py": "the pause when the authority changes, and statements that choose rows",
    f"{STORE}/test_locked_rows.py": "locks of rows",
    f"{SETTLE}/test_postgres_ends.py": "ends that a row or its lock keeps back",
    f"{SETTLE}/test_pull_thread.py": "the thread that pulls has no part while the ledger decides",
}


def test_files_of_one_store_are_those_of_the_table() -> None:
    root = Path(__file__).parents[2]
    in_folders = {
        str(path.relative_to(root)) for folder in (LEDGER, SETTLE) for path in (root / folder).glob("test_*.py")
    }
    assert in_folders <= OF_ONE_STORE.keys()
    assert [path for path in OF_ONE_STORE if not (root / path).is_file()] == []


# -- what operators hold back


def test_cordoned_worker_takes_nothing_more_until_uncordoned(authority: Authority) -> None:
    authority.worker("a", cpus=2000)
    running = authority.submit(cpus=1000)
    assert authority.starts("a") == [running]
    controls.cordon(authority.stores, ["a"], reason="fan", by="ann")
    job = authority.submit(cpus=1000)
    assert authority.starts("a") == []
    assert authority.end(running) == "released"
    assert (authority.starts("a"), authority.waits(job)) == ([], True)
    # A worker of the name that starts anew is cordoned too.
    authority.worker("a", cpus=2000)
    assert authority.starts("a") == []
    authority.worker("b", cpus=1000)
    assert authority.starts("b") == [job]
    last = authority.submit(cpus=2000)
    (order,) = controls.uncordon(authority.stores, ["a"])
    assert (order.before, order.applied, authority.starts("a")) == (True, True, [last])


@pytest.mark.parametrize("names", [{}, {"queue": "mail"}, {"task": "task"}, {"tenant": "default"}], ids=str)
def test_paused_jobs_wait_and_start_when_resumed(authority: Authority, names: dict[str, str]) -> None:
    authority.worker("a", cpus=4000, queues=["celery", "mail"])
    before = authority.submit(cpus=1000, queue="mail")
    assert authority.starts("a") == [before]
    scope = Scope.of(**names)
    assert not controls.pause(authority.stores, scope, reason="full disk").before
    job = authority.submit(cpus=1000, queue="mail")
    other = authority.submit(cpus=1000)
    assert authority.starts("a") == ([other] if "queue" in names else [])
    assert authority.end(before) == "released"
    assert (authority.waits(job), authority.why(job), authority.starts("a")) == (True, Reason.PAUSED, [])
    assert controls.resume(authority.stores, scope).before
    assert authority.starts("a") == ([job] if "queue" in names else [job, other])


def test_two_pauses_hold_a_job_until_both_are_over(authority: Authority) -> None:
    authority.worker("a", cpus=4000)
    for scope in (Scope.of(), Scope.of(queue="celery")):
        controls.pause(authority.stores, scope)
    job = authority.submit(cpus=1000)
    controls.resume(authority.stores, Scope.of())
    assert (authority.starts("a"), authority.why(job)) == ([], Reason.PAUSED)
    controls.resume(authority.stores, Scope.of(queue="celery"))
    assert authority.starts("a") == [job]


def test_order_for_an_unknown_worker_is_refused_and_noted_nowhere(authority: Authority) -> None:
    authority.worker("render-01", cpus=1000)
    with pytest.raises(InvalidRequest, match=r"there is no worker render-02.*The nearest: render-01"):
        controls.cordon(authority.stores, ["render-01", "render-02"])
    with authority.stage.engine.connect() as connection:
        assert (stored_controls.cordons(connection), stored_controls.version(connection)) == ({}, 0)


def test_priority_of_a_waiting_job_moves_it_in_the_backlog(authority: Authority) -> None:
    first, second, third = (authority.submit(cpus=1000) for _ in range(3))
    (raised, lowered) = priorities.set_priority(authority.stores, [third, first], 5, by="ann")
    assert (raised.became, raised.before, raised.priority) == ("moved", 0, 5)
    priorities.set_priority(authority.stores, [first], 0)
    assert lowered.job == first
    authority.worker("a", cpus=2000)
    assert authority.starts("a") == [third, first]
    authority.end(third)
    assert authority.starts("a") == [second]


def test_priority_of_a_running_job_is_that_of_its_next_attempt(authority: Authority) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000)
    assert authority.starts("a") == [job]
    other = authority.submit(cpus=1000, priority=7)
    (result,) = priorities.set_priority(authority.stores, [job], 5)
    assert (result.became, result.state) == ("next-attempt", "running")
    assert authority.end(job, "handed_back") == "released"
    assert authority.starts("a") == [other]
    authority.end(other)
    assert authority.starts("a") == [job]
    # Its retry is a publish with the priority that the message had at first.
    authority.republish(job)
    authority.end(job, "retried")
    authority.duty()
    assert authority.starts("a") == [job]
    assert authority.row(job).priority == 5
    authority.end(job)


def test_priority_of_an_ended_job_is_refused(authority: Authority) -> None:
    authority.worker("a", cpus=1000)
    job = authority.submit(cpus=1000)
    authority.starts("a")
    authority.end(job)
    (result,) = priorities.set_priority(authority.stores, [job], 9)
    assert (result.became, result.state, authority.row(job).priority) == ("ended-before", "succeeded", 0)


@pytest.mark.parametrize("wrong", [-1, 10, True, "9"])
def test_priority_that_is_none_is_refused_before_anything_is_written(authority: Authority, wrong: Any) -> None:
    job = authority.submit(cpus=1000)
    with pytest.raises(InvalidRequest, match="priority"):
        priorities.set_priority(authority.stores, [job], wrong)
    with pytest.raises(InvalidRequest, match="there is no job other"):
        priorities.set_priority(authority.stores, [job, "other"], 9)
    assert authority.row(job).priority == 0
