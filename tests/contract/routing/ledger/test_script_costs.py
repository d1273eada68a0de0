"""The cost in a script's header is true: a job costs no more commands than it says, and each bound is named there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest

from celery_capacity.routing.ledger import keys, scripts
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Adopted, Arrived, Ended
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import order
from tests.contract.routing.ledger.test_script_bounds import ASIDE
from tests.contract.routing.ledger.test_signatures import assembled
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES, VIEW

#: Jobs in the two calls that are compared, so that commands which every call gives do not count.
FEW: Final = 8
MANY: Final = 24
NUMBERS: Final = {
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "six": 6,
    "seven": 7,
    "ten": 10,
    "twelve": 12,
    "thirteen": 13,
    "fifteen": 15,
    "eighteen": 18,
}
#: A cost for each job, entry or place.
EACH: Final = re.compile(r"(?:at most )?(\w+) commands? an? (?:job|entry|place)")
#: Limits that end a loop of a script: the header names them.
BOUNDS: Final = {"candidates", "searched", "shapes", "most", "held"}

#: Token of each job's first attempt.
FIRST: Final = Token(1, 1)
ONE: Final = Request.of({"cpus": 1000}).shape
CAPACITY: Final = Request.of({"cpus": 1000 * MANY, "slots": MANY}).shape


class Counting(Ledger):
    """A ledger that counts the commands of one script."""

    def __init__(self, ledger: Ledger, script: str) -> None:
        super().__init__(ledger.settings)
        self.epoch = ledger.epoch
        self.commands = 0
        self._script = script

    def _calls(self, calls: Sequence[tuple[str, Sequence[Any]]]) -> list[list[str]]:
        if [name for name, _ in calls] != [self._script]:
            return super()._calls(calls)
        client: Any = self.client
        client.script_load(self._scripts[self._script].text)
        client.config_resetstat()
        reply = super()._calls(calls)
        stats = client.info("commandstats").items()
        self.commands += sum(counter["calls"] for command, counter in stats if not re.search(ASIDE, command))
        return reply


def submit(ledger: Ledger, jobs: Sequence[str]) -> None:
    ledger.register("w", "w-life", "queue.w", CAPACITY, VIEW)
    ledger.submit_many([(job, ONE, order(0, place), MESSAGE, 0, 0, 0) for place, job in enumerate(jobs)])


def refill(ledger: Ledger, jobs: Sequence[str]) -> None:
    """Fetch jobs that start at once."""
    rows = [(job, ONE, order(0, place), MESSAGE, 0, 0, 0) for place, job in enumerate(jobs)]
    ledger.refill(ONE, None, rows)


def run(ledger: Ledger, jobs: Sequence[str]) -> None:
    submit(ledger, jobs)
    ledger.settle("w", "w-life", arrived=[Arrived(job, FIRST, "n") for job in jobs], most_losses=MOST_LOSSES)


def file(ledger: Ledger, jobs: Sequence[str]) -> None:
    """Let the jobs wait, because no worker is there."""
    ledger.submit_many([(job, ONE, order(0, place), MESSAGE, 0, 0, 0) for place, job in enumerate(jobs)])


def run_and_expire(ledger: Ledger, jobs: Sequence[str]) -> None:
    run(ledger, jobs)
    ledger.expire_lease("w", "w-life")


def deliver_late(ledger: Ledger, jobs: Sequence[str]) -> None:
    submit(ledger, jobs)
    ledger.client.zadd(keys.UNCLAIMED, dict.fromkeys(jobs, 0))


def carry(ledger: Ledger, jobs: Sequence[str]) -> None:
    ledger.client.sadd(keys.CARRIED, *jobs)


def file_and_register(ledger: Ledger, jobs: Sequence[str]) -> None:
    """Let the jobs wait though a worker runs them, as after a backlog that was read before their claims."""
    file(ledger, jobs)
    ledger.register("w", "w-life", "queue.w", CAPACITY, VIEW, admit=False)


def hold_strays(ledger: Ledger, jobs: Sequence[str]) -> None:
    ledger.client.hset(keys.held("w"), mapping=dict.fromkeys(jobs, "1.1"))


def run_before_tenants(ledger: Ledger, jobs: Sequence[str]) -> None:
    run(ledger, jobs)
    ledger.client.hset(keys.EPOCH, "tenants", "1")


def index_strays(ledger: Ledger, jobs: Sequence[str]) -> None:
    ledger.client.zadd(keys.free_of("gpus"), dict.fromkeys(jobs, 1))


def queue_strays(ledger: Ledger, jobs: Sequence[str]) -> None:
    ledger.client.zadd(keys.wait(ONE), dict.fromkeys(jobs, 1))


def nothing(ledger: Ledger, jobs: Sequence[str]) -> None:
    """Begin with empty books."""


def release(ledger: Ledger, jobs: Sequence[str], outcome: Outcome) -> None:
    ended = [Ended(job, FIRST, outcome, "gone") for job in jobs]
    ledger.settle("w", "w-life", ended=ended, most_losses=MOST_LOSSES, admit=False)


def adopt(ledger: Ledger, jobs: Sequence[str]) -> None:
    ledger.adopt("w", "w-life", [Adopted(job, FIRST, ONE, 1, 1, 2, "n", 0) for job in jobs])


def acknowledge(ledger: Ledger, jobs: Sequence[str]) -> None:
    client: Any = ledger.client
    entries = client.xrange(keys.STREAM)
    ledger.ack_transitions([(entry.decode(), fields[b"job"].decode()) for entry, fields in entries])


def unblock(ledger: Ledger, jobs: Sequence[str]) -> None:
    ledger.unblock_carried([(job, FIRST, "lost", "1") for job in jobs])


Call = Callable[[Ledger, Sequence[str]], object]
#: A script, the books before it, and a call for some jobs. The case with the most commands a job is among them.
CASES: Final[list[tuple[str, Call, Call]]] = [
    ("submit_many", file_and_register, lambda ledger, jobs: submit(ledger, [f"{job}-other" for job in jobs])),
    ("submit_many", nothing, file),
    ("refill", file_and_register, lambda ledger, jobs: refill(ledger, [f"{job}-other" for job in jobs])),
    (
        "claim",
        submit,
        lambda ledger, jobs: ledger.settle(
            "w", "w-life", arrived=[Arrived(job, FIRST, "n", "digest") for job in jobs], most_losses=MOST_LOSSES
        ),
    ),
    ("claim", nothing, run),
    ("release", run, lambda ledger, jobs: release(ledger, jobs, Outcome.SUCCEEDED)),
    ("release", submit, lambda ledger, jobs: release(ledger, jobs, Outcome.HANDED_BACK)),
    ("release", run, lambda ledger, jobs: release(ledger, jobs, Outcome.LOST)),
    ("redeliver", deliver_late, lambda ledger, jobs: ledger.redeliver()),
    ("ack_transitions", run, acknowledge),
    (
        "unblock_carried",
        carry,
        lambda ledger, jobs: ledger.unblock_carried([(job, FIRST, "lost", "1") for job in jobs]),
    ),
    ("adopt", file_and_register, adopt),
    ("adopt", run, adopt),
    ("drain", submit, lambda ledger, jobs: ledger.drain("w", "w-life")),
    ("lapse", run_and_expire, lambda ledger, jobs: ledger.lapse("w", 0, MOST_LOSSES)),
    (
        "take_back_missing",
        run,
        lambda ledger, jobs: ledger.take_back_missing("w", "w-life", [], MOST_LOSSES, 0),
    ),
    ("hand_over_again", run, lambda ledger, jobs: ledger.hand_over_again("w", "w-life", [])),
    ("compare_jobs", submit, lambda ledger, jobs: ledger.compare_jobs("\n".join(f"{job} - - - -" for job in jobs))),
    (
        "reprioritize",
        file,
        lambda ledger, jobs: ledger.reprioritize([(job, order(9, place), "") for place, job in enumerate(jobs)]),
    ),
    ("prune_held", hold_strays, lambda ledger, jobs: ledger.prune_held("w")),
    ("count_held", run_before_tenants, lambda ledger, jobs: ledger.count_held(["w"])),
    ("prune_index", index_strays, lambda ledger, jobs: ledger.prune_index("gpus", 0, MANY)),
    ("find_misplaced", queue_strays, lambda ledger, jobs: ledger.find_misplaced(ONE, 0, MANY)),
]


def limits(text: str) -> set[str]:
    return set(re.findall(r"\bLIMIT\.(\w+)", text))


def test_each_script_with_a_cost_for_each_job_is_measured() -> None:
    assert {name for name in scripts.names() if EACH.match(scripts.header(name)["Cost"])} == {
        name for name, *_ in CASES
    }


@pytest.mark.leaves("I6", because="one case files strays, and only looks for them", sometimes=True)
@pytest.mark.parametrize(("script", "prepare", "call"), CASES)
def test_job_costs_no_more_commands_than_the_header_says(
    ledger: Ledger, script: str, prepare: Call, call: Call
) -> None:
    counts = []
    for jobs in (FEW, MANY):
        ids = [f"job-{number}" for number in range(jobs)]
        ledger.client.flushdb()
        ledger.open_epoch(1)
        ledger.finish_epoch(1)
        ledger.client.hincrby(keys.EPOCH, "opened", -3_600_000)
        prepare(ledger, ids)
        counting = Counting(ledger, script)
        call(counting, ids)
        counts.append(counting.commands)
        counting.client.close()
    each = EACH.match(scripts.header(script)["Cost"])
    assert each is not None
    assert 0 < (counts[1] - counts[0]) / (MANY - FEW) <= NUMBERS[each.group(1)]


@pytest.mark.parametrize("script", scripts.names())
def test_cost_in_a_header_names_the_limits_that_the_script_keeps(script: str) -> None:
    kept = limits(assembled(script))
    cost = scripts.header(script)["Cost"]
    listed = limits(cost)
    assert listed <= kept
    if "like that of fill" in cost:
        listed |= limits(scripts.header("fill")["Cost"])
    if listed & {"candidates", "searched"}:
        # A submission of one job looks at candidates; a submission of many keeps to both limits.
        listed |= {"candidates", "searched"}
    assert kept & BOUNDS <= listed


def test_release_looks_for_no_shapes_while_none_waits(ledger: Ledger) -> None:
    run(ledger, ["job"])
    client: Any = ledger.client
    client.config_resetstat()

    release_and_admit(ledger, "job")

    ran = set(client.info("commandstats"))
    assert "cmdstat_xadd" in ran
    assert "cmdstat_zrangebyscore" not in ran


def test_release_looks_for_no_shapes_while_all_ask_for_more_cpus(ledger: Ledger) -> None:
    run(ledger, ["job"])
    for more in range(1, FEW):
        wide = Request.of({"cpus": 1000 * (MANY + more)}).shape
        ledger.submit_many([(f"wide-{more}", wide, order(0, more), MESSAGE, 0, 0, 0)])
    client: Any = ledger.client
    client.config_resetstat()

    release_and_admit(ledger, "job")

    ran = set(client.info("commandstats"))
    assert "cmdstat_zcount" in ran
    assert "cmdstat_zrangebyscore" not in ran


def test_release_admits_job_that_came_back_in_the_same_script(ledger: Ledger) -> None:
    """No job waited when the script began."""
    run(ledger, ["job"])

    release_and_admit(ledger, "job", Outcome.HANDED_BACK)

    assert ledger.client.hgetall(keys.held("w")) == {b"job": b"1.2"}


def release_and_admit(ledger: Ledger, job: str, outcome: Outcome = Outcome.SUCCEEDED) -> None:
    ledger.settle("w", "w-life", ended=[Ended(job, FIRST, outcome)], most_losses=MOST_LOSSES, follow=False)
