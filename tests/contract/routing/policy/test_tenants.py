"""The scripts start what the policy starts while tenants share the workers, and count their use exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from hypothesis import example, given, settings
from hypothesis import strategies as st

from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Ended
from celery_capacity.routing.model.amounts import labels
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.request import Request, alternatives_term
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.fill import fill_or_keep
from celery_capacity.routing.policy.placement import MAX_ADMITTED, Book, Waiting, order
from celery_capacity.routing.policy.tenants import Rule, Sharing, tenant_term
from tests.contract.routing.ledger.test_admission import ON_A_SERVER, REQUESTS, VECTORS, delivered, vectors, write
from tests.fixtures.property_tests import examples
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES, VIEW

SERVED: Final = ("celery", "mail", "Vidéo/hd")
TENANTS: Final = ("default", "physics", "bio.2", "art-3")
#: Requests of a job beside its first one.
OTHERS: Final = st.lists(VECTORS, max_size=2)
BACKLOG: Final = st.lists(st.tuples(REQUESTS, st.integers(0, 2), st.sampled_from(TENANTS), OTHERS), max_size=24).map(
    lambda jobs: [
        Waiting(f"job-{seq:02}", request, order(rank, seq), terms=alternatives(request, others) + tenant_term(tenant))
        for seq, (request, rank, tenant, others) in enumerate(jobs)
    ]
)
#: Few amounts, so that tenants tie, and that quotas and nominal shares are met exactly.
PART: Final = st.dictionaries(st.sampled_from(["cpus", "slots"]), st.sampled_from([1, 2, 1000, 2000]), max_size=2)
RULES: Final = st.dictionaries(
    st.sampled_from(TENANTS), st.builds(Rule, st.sampled_from([1, 2, 3]), PART, PART), max_size=3
)
USED: Final = st.dictionaries(st.sampled_from(TENANTS), vectors(st.integers(0, 3)), max_size=4)
PAST: Final = st.dictionaries(st.sampled_from(TENANTS), st.sampled_from([0.0, 0.125, 0.5, 0.7]), max_size=4)
TOTAL: Final = st.sampled_from([{"cpus": 8000, "memory": 12, "slots": 16, "licence": 2}, {"cpus": 4000}, {}])
SHARINGS: Final = st.builds(Sharing, RULES, USED, PAST, TOTAL)


def alternatives(request: Request, others: Sequence[Mapping[str, int]]) -> str:
    """Return the term of a job whose first alternative this is, with others in its queue; "" without others."""
    return alternatives_term([*dict.fromkeys([request, *(Request.of(it).within(request.queue) for it in others)])])


def passes(book: Book, backlog: Sequence[Waiting], sharing: Sharing) -> tuple[list[str], Sharing]:
    """Return the jobs that the policy admits, pass after pass, and the shares after them."""
    admitted: list[Waiting] = []
    while True:
        started = {waiting.job for waiting in admitted}
        remaining = [job for job in backlog if job.job not in started]
        more = fill_or_keep(book, remaining, MAX_ADMITTED, sharing=sharing).admitted
        for waiting in more:
            book, sharing = book.holding(waiting.request), sharing.holding(waiting.shape, waiting.request)
        admitted += more
        if len(more) < MAX_ADMITTED:
            return [waiting.job for waiting in admitted], sharing


def write_sharing(ledger: Ledger, sharing: Sharing) -> None:
    """Write rules, use and capacity as they would have come about."""
    rules = {("tenant", tenant): rule.text for tenant, rule in sharing.rules.items()}
    assert ledger.set_controls(1, rules, last=True)
    used = {f"{tenant}/{name}": amount for tenant, held in sharing.used.items() for name, amount in held.items()}
    for key, fields in ((keys.USED, used), (keys.PAST, sharing.past), (keys.TOTALS, sharing.total)):
        ledger.client.delete(key)
        for field, number in fields.items():
            ledger.client.hset(key, field, str(number))
    ledger.client.hset(keys.EPOCH, "tenants", "1")


def read_used(ledger: Ledger) -> dict[str, int]:
    return {
        snapshot.text(field): int(amount) for field, amount in ledger.client.hgetall(keys.USED).items() if int(amount)
    }


def flat(used: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {f"{tenant}/{name}": amount for tenant, held in used.items() for name, amount in held.items() if amount}


def file(ledger: Ledger, backlog: Sequence[Waiting]) -> None:
    for waiting in backlog:
        assert ledger.submit(waiting.job, waiting.shape, waiting.order, MESSAGE).state == "waiting"


#: A tenant that has used its quota up, in a cluster whose capacity the ledger does not know yet.
FULL: Final = Sharing({"physics": Rule(quota={"cpus": 2000})}, {"physics": {"cpus": 2000}}, {}, {})
WAITS: Final = Waiting("job-00", Request.of({"cpus": 1000}), order(0, 0), terms=tenant_term("physics"))


@settings(ON_A_SERVER, max_examples=examples(300))
@example([WAITS], {"cpus": 4000, "memory": 0, "slots": 9}, FULL)
@given(BACKLOG, vectors(st.integers(1, 50)), SHARINGS)
def test_release_admits_what_the_policy_admits_among_tenants(
    ledger: Ledger, backlog: list[Waiting], capacity: dict[str, int], sharing: Sharing
) -> None:
    write(ledger, [])
    whole = Request.of(capacity)
    ledger.register("w", "life", "queue", Capacity(whole.amounts).serving(SERVED).shape, VIEW)
    assert ledger.submit("first", whole.shape, order(9, 0), MESSAGE).worker == "w"
    file(ledger, backlog)
    write_sharing(ledger, sharing)
    ledger.client.delete("queue")
    expected, after = passes(Book("w", {**capacity, **labels(SERVED)}, {}), backlog, sharing)
    ended = [Ended("first", Token(1, 1), Outcome.SUCCEEDED)]
    assert ledger.settle("w", "life", ended=ended, most_losses=MOST_LOSSES).released[0].verdict == "released"
    assert delivered(ledger.client, "queue") == expected
    assert read_used(ledger) == flat(after.used)
    # The use at the beginning is nobody's.
    ledger.client.delete(keys.USED)
    write(ledger, [])
