"""Every script is bounded, whatever stands in the ledger: 20,000 unknown entries make it no longer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pytest

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys, scripts, snapshot
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import Adopted, Arrived, Ended
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome, State
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.placement import SHAPES, order
from celery_capacity.routing.policy.reservation import Reservation
from tests.contract.routing.ledger.test_signatures import assembled
from tests.fixtures.servers.pair import empty_redis
from tests.fixtures.stores.books import FOR_EVER, MESSAGE, MOST_LOSSES, VIEW, write_job

#: Entries in each list, queue and index that nobody knows.
STRANGERS: Final = 20_000
#: Commands of one script: some 5 ms of a server at the most.
MOST_COMMANDS: Final = 3_000
#: Calls of each script that are measured in one test. Later calls go on, unmeasured, until no stranger is left.
CALLS: Final = 12
#: Calls after which a test has seen enough.
ENOUGH: Final = 4_000
#: Commands that the measuring itself gives.
ASIDE: Final = "evalsha|config|slowlog|info|script"

ONE: Final = Request.of({"cpus": 1000}).shape
ALONE: Final = Request.of({"cpus": 1000, "alone": 1}).shape
CAPACITY: Final = Request.of({"cpus": 4000, "gpus": 1, "slots": 8}).shape
KEPT: Final = keys.KEYS["kept"]


class Enough(Exception):
    """The call limit of a test is reached."""


@dataclass(frozen=True)
class Cost:
    """Cost of one call of a script: the number of commands that it gave, and its time (microseconds)."""

    commands: int
    micros: int


class Measured(Ledger):
    """A ledger that measures each script that it calls, one at a time."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.costs: dict[str, list[Cost]] = {}
        self.measures = False
        self.called = 0

    def _calls(self, calls: Sequence[tuple[str, Sequence[Any]]]) -> list[list[str]]:
        if not self.measures:
            return super()._calls(calls)
        return [self._measured(name, args) for name, args in calls]

    def _measured(self, name: str, args: Sequence[Any]) -> list[str]:
        self.called += 1
        if self.called > ENOUGH:
            raise Enough
        if len(self.costs.setdefault(name, [])) == CALLS:
            return super()._calls([(name, args)])[0]
        client: Any = self.client
        # Load the script first, so that the server knows it, and only the script itself is measured.
        client.script_load(self._scripts[name].text)
        client.config_resetstat()
        client.slowlog_reset()
        reply = super()._calls([(name, args)])[0]
        commands = client.info("commandstats").items()
        count = sum(counter["calls"] for command, counter in commands if not re.search(ASIDE, command))
        slow = [
            slow_call["duration"] for slow_call in client.slowlog_get(10) if b"EVALSHA" in slow_call["command"].upper()
        ]
        self.costs[name].append(Cost(count, max(slow, default=0)))
        return reply


@pytest.fixture(scope="module")
def own_ledger(server_pair: Pair) -> Iterator[Measured]:
    """Yield a ledger on a server whose settings a test may change."""
    with empty_redis(server_pair) as redis_url:
        yield from measured(redis_url)


def measured(redis_url: str) -> Iterator[Measured]:
    ledger = Measured(
        Settings.from_environ(
            {
                "REDIS_URL": redis_url,
                "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
                "PLATFORM_WORKER_TTL": str(FOR_EVER),
                "PLATFORM_LOST_AFTER": str(FOR_EVER),
                "PLATFORM_START_TIMEOUT": str(FOR_EVER),
            }
        )
    )
    client: Any = ledger.client
    before = client.config_get("slowlog-log-slower-than")
    client.config_set("slowlog-log-slower-than", 0)
    yield ledger
    client.config_set("slowlog-log-slower-than", before["slowlog-log-slower-than"])
    client.flushdb(asynchronous=True)
    client.close()


#: Lua that builds these entries in one place. ARGV is the command, its key, the format of an entry, and the value
#: that goes with each entry. In a sorted set that value comes before the entry.
BUILD: Final = """
for i = 1, tonumber(ARGV[5]) do
  local entry = string.format(ARGV[3], i)
  if ARGV[1] == 'ZADD' then
    redis.call('ZADD', ARGV[2], ARGV[4], entry)
  elseif ARGV[1] == 'HSET' then
    redis.call('HSET', ARGV[2], entry, ARGV[4])
  elseif ARGV[1] == 'LPUSH' or ARGV[1] == 'SADD' then
    redis.call(ARGV[1], ARGV[2], entry)
  else
    redis.call('XADD', ARGV[2], '*', 'job', entry)
  end
end
"""
STRANGER: Final = "stranger-%d"


class Flood:
    """20,000 entries, in one place each, of jobs, workers or shapes that are nowhere else."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.client: Any = ledger.client
        #: True while strangers stand everywhere.
        self.full = False

    def empty(self) -> Flood:
        """Begin with a ledger in which nothing stands."""
        self.client.flushdb(asynchronous=True)
        self.ledger.open_epoch(1)
        self.ledger.finish_epoch(1)
        self.full = False
        return self

    def fill_up(self) -> Flood:
        """Put strangers everywhere, beside a worker in order that runs a job which Postgres knows."""
        if not self.full:
            self.empty().worker()
            self.running()
            self.ledger.ack_transitions([(self.client.xrange(keys.STREAM)[-1][0].decode(), "job")])
            for flood in (self.queue, self.shapes, self.workers, self.held, self.unclaimed, self.messages, self.kept):
                flood()
            self.stream()
            self.full = True
        return self

    def _build(self, command: str, key: str, entry: str = STRANGER, beside: int | str = 1) -> None:
        self.client.eval(BUILD, 0, command, key, entry, beside, STRANGERS)

    def borders(self) -> None:
        """Put shapes whose heads run low into the places where they are noted."""
        for command, key in (("ZADD", keys.BORDER), ("SADD", keys.LOW)):
            self._build(command, key)
        self.client.hset(keys.EPOCH, "stay", "1")

    def queue(self, shape: str = ONE) -> None:
        """Put places of jobs into a queue, whose shape stands in the indexes before all others."""
        self._build("ZADD", keys.wait(shape))
        self.client.zadd(keys.SHAPES, {shape: 1})
        self.client.zadd(keys.shapes_of("queue:celery"), {shape: 1})

    def shapes(self) -> None:
        """Put shapes without a queue into the indexes, which every worker may take."""
        for key in (keys.SHAPES, keys.shapes_of("queue:celery"), keys.shapes_of("gpus")):
            self._build("ZADD", key, "cpus=%d,slots=1")

    def workers(self) -> None:
        """Put workers into the indexes, with room and without books."""
        for key, score in ((keys.FREE, 64_000), (keys.free_of("gpus"), 64_000), (keys.LEASES, 0)):
            self._build("ZADD", key, beside=score)

    def held(self) -> None:
        """Put jobs into the list of worker w."""
        self._build("HSET", keys.held("w"), beside="1.1")

    def missing(self) -> None:
        self._build("HSET", keys.missing("w"), f"{STRANGER} 1.1")

    def unclaimed(self) -> None:
        self._build("ZADD", keys.UNCLAIMED)

    def messages(self) -> None:
        """Put messages into the private queue of worker w."""
        self._build("LPUSH", "queue.w")

    def kept(self) -> None:
        self._build("HSET", KEPT, "alone=1,cpus=%d,slots=1", "stranger")

    def carried(self) -> None:
        """Put jobs into the set of carried ones, which nobody may bring in."""
        self._build("SADD", keys.CARRIED)

    def asked(self) -> None:
        """Put duties that nobody knows into the set of requested ones."""
        self._build("SADD", keys.KEYS["asked"])

    def stream(self) -> None:
        self._build("XADD", keys.STREAM)

    def worker(self, name: str = "w") -> None:
        """Register a worker that is in order but for the flood."""
        self.ledger.register(name, f"{name}-life", f"queue.{name}", CAPACITY, VIEW)

    def running(self, job: str = "job") -> None:
        assert self.ledger.submit(job, ONE, order(0, 1), MESSAGE).worker == "w"
        self.ledger.settle("w", "w-life", arrived=[Arrived(job, Token(1, 1), "n")], most_losses=MOST_LOSSES)

    def expire(self) -> None:
        end = self.ledger.now_ms() - 1000
        self.client.hset(keys.book("w"), mapping={"lease": end, "lapsed": end})
        self.client.zadd(keys.LEASES, {"w": end})


#: Prepares a ledger with strangers, and returns the action that a script is then asked to do.
Driver = Callable[[Flood], Callable[[], object]]


def submit(flood: Flood) -> Callable[[], object]:
    flood.empty().workers()
    return lambda: flood.ledger.submit("job", ONE, order(0, 1), MESSAGE)


def submit_many(flood: Flood) -> Callable[[], object]:
    flood.empty().workers()
    shapes = [Request.of({"cpus": 1000 + number}).shape for number in range(100)]
    rows = [(f"job-{shape}", shape, order(0, 1), MESSAGE, 0, 0, 0) for shape in shapes]
    return lambda: flood.ledger.submit_many(rows)


def place_shape(flood: Flood) -> Callable[[], object]:
    flood.empty().worker()
    flood.queue()
    return lambda: flood.ledger.place_shape(ONE)


def place_shape_alone(flood: Flood) -> Callable[[], object]:
    """Drive a last place of a shape that goes: a worker that was kept for it meets a queue of strangers."""
    flood.empty().worker()
    flood.client.hset(keys.book("w"), "kept", ALONE)
    flood.client.hset(KEPT, ALONE, "w")
    flood.worker("v")
    flood.client.zadd(keys.wait(ALONE), {"stranger": 0})
    flood.client.zadd(keys.SHAPES, {ALONE: 0})
    flood.queue()
    return lambda: flood.ledger.place_shape(ALONE)


def find_room(flood: Flood) -> Callable[[], object]:
    flood.empty().workers()
    flood.shapes()
    return lambda: list(flood.ledger.find_room())


def fill(flood: Flood) -> Callable[[], object]:
    flood.empty().worker()
    flood.queue()
    return lambda: flood.ledger.fill("w")


def fill_shapes(flood: Flood) -> Callable[[], object]:
    flood.empty().worker()
    flood.shapes()
    return lambda: flood.ledger.fill("w")


def release(flood: Flood) -> Callable[[], object]:
    flood.empty().worker()
    flood.running()
    flood.queue()
    flood.shapes()
    ended = [Ended("job", Token(1, 1), Outcome.SUCCEEDED)]
    return lambda: flood.ledger.settle("w", "w-life", ended=ended, most_losses=MOST_LOSSES, nonce="n")


def register(flood: Flood) -> Callable[[], object]:
    flood.empty().held()
    flood.queue()
    return lambda: flood.ledger.register("w", "w-life", "queue.w", CAPACITY, VIEW)


def register_next(flood: Flood) -> Callable[[], object]:
    """Drive a registration after a life that left a long queue."""
    flood.empty().worker()
    flood.messages()
    flood.missing()
    flood.expire()
    return lambda: flood.ledger.register("w", "next-life", "queue.next", CAPACITY, VIEW)


def reserve_book(flood: Flood) -> Callable[[], object]:
    flood.empty().held()
    return lambda: flood.ledger.reserve_book("w", "w-life", CAPACITY)


def renew(flood: Flood) -> Callable[[], object]:
    flood.empty().worker()
    flood.running()
    flood.queue()
    flood.held()
    flood.missing()
    return lambda: flood.ledger.renew("w", "w-life", VIEW, ["job"], MOST_LOSSES)


def take_back_missing(flood: Flood) -> Callable[[], object]:
    flood.empty().worker()
    flood.running()
    flood.held()
    return lambda: flood.ledger.take_back_missing("w", "w-life", [], MOST_LOSSES, 0)


def leave(flood: Flood) -> Callable[[], object]:
    flood.empty().worker()
    flood.messages()
    flood.missing()
    return lambda: flood.ledger.leave("w", "w-life")


def lapse(flood: Flood) -> Callable[[], object]:
    flood.empty().worker()
    flood.running()
    flood.held()
    flood.messages()
    flood.missing()
    flood.expire()
    return lambda: flood.ledger.lapse("w", 0, MOST_LOSSES)


def recount(flood: Flood) -> Callable[[], object]:
    flood.empty().worker()
    flood.running()
    flood.held()
    return lambda: flood.ledger.recount(["w"])


def redeliver(flood: Flood) -> Callable[[], object]:
    flood.empty().unclaimed()
    return flood.ledger.redeliver


def adopt(flood: Flood) -> Callable[[], object]:
    held = [Adopted(f"job-{number}", Token(1, 1), ONE, number, 1, 1, "n", 0) for number in range(1000)]
    flood.fill_up()
    return lambda: flood.ledger.adopt("w", "w-life", held)


def claim(flood: Flood) -> Callable[[], object]:
    flood.fill_up()
    arrived = [Arrived("job", Token(1, 1), "n"), Arrived("stranger-1", Token(1, 1), "n")]
    return lambda: flood.ledger.settle("w", "w-life", arrived=arrived, most_losses=MOST_LOSSES)


def cancel(flood: Flood) -> Callable[[], object]:
    flood.fill_up()
    write_job(flood.client, "stranger-1", state="waiting", epoch=1, attempt=0, shape=ONE, order=1)
    return lambda: flood.ledger.cancel("stranger-1", State.CANCELLED)


def ack_transitions(flood: Flood) -> Callable[[], object]:
    flood.fill_up()
    entries = flood.client.xrange(keys.STREAM, count=500)
    return lambda: flood.ledger.ack_transitions(
        [(entry.decode(), fields[b"job"].decode()) for entry, fields in entries]
    )


def among_strangers(ask: Callable[[Ledger], object]) -> Driver:
    """Return a driver of this call in a ledger where strangers stand everywhere."""

    def driver(flood: Flood) -> Callable[[], object]:
        flood.fill_up()
        return lambda: ask(flood.ledger)

    return driver


def elect(flood: Flood) -> Callable[[], object]:
    flood.empty().asked()
    return lambda: flood.ledger.elect("life", 0, 90.0, ["due"], "w")


def close_epoch(flood: Flood) -> Callable[[], object]:
    """Drive the removal of old books, with a long queue and a long list among them."""
    flood.empty().queue()
    flood.held()
    flood.messages()
    ledger = flood.ledger

    def close() -> None:
        ledger.close_epoch(2, ledger.run_id, "begin")
        ledger.close_epoch(2, ledger.run_id, "remove", [keys.wait(ONE), keys.held("w"), "queue.w"])
        ledger.close_epoch(2, ledger.run_id, "carry", [f"stranger-{number}" for number in range(1000)])

    return close


def finish_epoch(flood: Flood) -> Callable[[], object]:
    flood.empty().carried()
    return lambda: flood.ledger.finish_epoch(1)


def unblock_carried(flood: Flood) -> Callable[[], object]:
    flood.empty().carried()
    return lambda: flood.ledger.unblock_carried(
        [(f"stranger-{number}", Token(1, 1), "succeeded", "1") for number in range(200)]
    )


def in_new_ledger(flood: Flood) -> Callable[[], object]:
    flood.empty()
    return lambda: flood.ledger.open_epoch(2)


#: Changes and jobs of one call, as many as a program sends.
CONTROLS: Final = {("cordon", "w"): "draining", **{("pause", f"queue:q{number}"): "1" for number in range(49)}}
RANKED: Final = [(f"stranger-{number}", 7, "") for number in range(SHAPES)]


def resume_shapes(ledger: Ledger) -> int:
    ledger.client.sadd(keys.WITHHELD, *(Request.of({"cpus": number}).shape for number in range(1, SHAPES + 1)))
    return ledger.resume_shapes()


ROWS: Final = "\n".join(f"stranger-{number} waiting 1.0 - 1" for number in range(500))


def begin_refill(flood: Flood) -> Callable[[], object]:
    flood.empty().borders()
    return lambda: flood.ledger.begin_refill()


def find_low(flood: Flood) -> Callable[[], object]:
    flood.empty().borders()
    return lambda: flood.ledger.find_low()


def refill(flood: Flood) -> Callable[[], object]:
    flood.empty().worker()
    flood.queue()
    rows = [(f"job-{number}", ONE, number, MESSAGE, 0, 0, 0) for number in range(100)]
    return lambda: flood.ledger.refill(ONE, 100, rows)


def reserve(flood: Flood) -> Callable[[], object]:
    flood.empty().worker()
    flood.client.zadd(keys.SHAPES, {ONE: 7})
    flood.queue()
    allocated = snapshot.read_books(flood.client, ["w"])["w"].allocated
    return lambda: flood.ledger.reserve(Reservation("w", ONE, 7, 0, {"cpus": 1000}), allocated, ["w"])


def unreserve(flood: Flood) -> Callable[[], object]:
    flood.empty().worker()
    flood.client.hset(keys.book("w"), "kept", ONE)
    flood.client.hset(KEPT, ONE, "w")
    return lambda: flood.ledger.unreserve(ONE, [])


#: Drivers of each script, where it has the most to do. Each script stands here.
DRIVERS: Final[dict[str, tuple[Driver, ...]]] = {
    "adopt": (adopt,),
    "cancel": (cancel,),
    "claim": (claim,),
    "compare_jobs": (among_strangers(lambda ledger: ledger.compare_jobs(ROWS)),),
    "drain": (among_strangers(lambda ledger: ledger.drain("w", "w-life")),),
    "hand_over_again": (among_strangers(lambda ledger: ledger.hand_over_again("w", "w-life", [])),),
    "remove_job": (among_strangers(lambda ledger: ledger.remove_job("job", Token(1, 1), final=True)),),
    "ack_transitions": (ack_transitions,),
    "repair_queue": (among_strangers(lambda ledger: ledger.repair_queue(ONE, "stranger-1")),),
    "find_misplaced": (among_strangers(lambda ledger: ledger.find_misplaced(ONE, 0, 500)),),
    "revoke": (among_strangers(lambda ledger: ledger.revoke("stranger-1")),),
    "repair_job": (among_strangers(lambda ledger: ledger.repair_job("stranger-1")),),
    "note_successor": (among_strangers(lambda ledger: ledger.note_successor("stranger-1", MESSAGE)),),
    "set_total": (among_strangers(lambda ledger: ledger.set_total(0, 0)),),
    "set_waiting": (among_strangers(lambda ledger: ledger.set_waiting(0, 0)),),
    "age_shares": (among_strangers(lambda ledger: ledger.age_shares({"cpus": 1000})),),
    "set_tight": (among_strangers(lambda ledger: ledger.set_tight(False)),),
    "set_controls": (among_strangers(lambda ledger: ledger.set_controls(9, CONTROLS, last=True)),),
    "resume_shapes": (among_strangers(resume_shapes),),
    "reprioritize": (among_strangers(lambda ledger: ledger.reprioritize(RANKED)),),
    "prune_index": (among_strangers(lambda ledger: ledger.prune_index("gpus", 0, 500)),),
    "prune_held": (among_strangers(lambda ledger: ledger.prune_held("w")),),
    "set_use": (among_strangers(lambda ledger: ledger.set_use({"physics/cpus": (0, 1)}, "0-0")),),
    "count_held": (among_strangers(lambda ledger: ledger.count_held(["w"])),),
    "expire_lease": (among_strangers(lambda ledger: ledger.expire_lease("w", "w-life")),),
    # From here on each driver makes its own strangers.
    "elect": (elect,),
    "fill": (fill, fill_shapes),
    "find_room": (find_room,),
    "begin_refill": (begin_refill,),
    "find_low": (find_low,),
    "refill": (refill,),
    "close_epoch": (close_epoch,),
    "finish_epoch": (finish_epoch,),
    "unblock_carried": (unblock_carried,),
    "lapse": (lapse,),
    "leave": (leave,),
    "open_epoch": (in_new_ledger,),
    "place_shape": (place_shape, place_shape_alone),
    "recount": (recount,),
    "redeliver": (redeliver,),
    "register": (register, register_next),
    "release": (release,),
    "renew": (renew,),
    "reserve": (reserve,),
    "reserve_book": (reserve_book,),
    "submit": (submit,),
    "submit_many": (submit_many,),
    "take_back_missing": (take_back_missing,),
    "unreserve": (unreserve,),
}


@pytest.fixture(scope="module")
def flood(own_ledger: Measured) -> Flood:
    return Flood(own_ledger)


def test_every_script_is_driven() -> None:
    assert sorted(DRIVERS) == list(scripts.names())


@pytest.mark.parametrize(
    ("name", "driver"), [pytest.param(name, case, id=name) for name, drivers in DRIVERS.items() for case in drivers]
)
def test_script_gives_few_commands_whatever_the_ledger_holds(
    own_ledger: Measured, flood: Flood, name: str, driver: Driver
) -> None:
    drive = driver(flood)
    own_ledger.costs.clear()
    own_ledger.measures, own_ledger.called = True, 0
    try:
        drive()
    except Enough:
        assert own_ledger.called > ENOUGH
    finally:
        own_ledger.measures = False
    assert name in own_ledger.costs
    for script, costs in own_ledger.costs.items():
        print(script, *costs)
        assert max(cost.commands for cost in costs) <= MOST_COMMANDS, script


#: Commands that read a whole key, and where they may. A book has as many fields as its worker has resources, and the
#: epoch has as many as there are facts about it. A list is read whole where it was seen to be short.
SHORT: Final = ("KEY.book", "KEY.epoch", "KEY.held", "key")
WHOLE: Final = {"HGETALL": SHORT, "HKEYS": (), "HVALS": (), "SMEMBERS": (), "LRANGE": ()}


@pytest.mark.parametrize("name", scripts.names())
def test_script_reads_no_long_key_whole(name: str) -> None:
    code = assembled(name)
    for command, key in re.findall(r"redis\.call\('(\w+)', ([\w.]+)", code):
        assert command not in WHOLE or key in WHOLE[command], f"{command} {key}"
        # A command that frees a key of unknown length does so in a thread of the server.
        assert command != "DEL" or key in ("KEY.job", "KEY.view", "KEY.book", "KEY.epoch"), f"{command} {key}"
    for command, rest in re.findall(r"redis\.call\('(ZRANGE\w*|XRANGE)', ([^\n]*)", code):
        assert command == "ZRANGE" or re.search("'(LIMIT|COUNT)'", rest), f"{command} {rest}"
