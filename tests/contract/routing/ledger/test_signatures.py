"""The header of each script says what the script is: its keys, its arguments, its replies, and the edges it makes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import client as bindings
from celery_capacity.routing.ledger import keys, scripts
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.repair import control_groups
from celery_capacity.routing.ledger.replies import Adopted, Arrived, Ended
from celery_capacity.routing.model.states import Outcome, State
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.reservation import Reservation

NAMES: Final = scripts.names()
#: Replies that every script that acts on the books may give besides its own: `LedgerServer` raises for these.
GATES: Final = {"cold", "epoch", "foreign"}
#: Scripts that act on keys of one job or entry, whatever epoch is open.
WITHOUT_GATE: Final = {"ack_transitions", "open_epoch", "note_successor", "elect"}

CARD: Final = ("1.1", "1", "2", "3-0", "0", "cpus=1000,slots=1", "0", "5", "{}")


@dataclass(frozen=True)
class Binding:
    """Call of one script's method, with the method's answer to each reply of the header, by the reply's head."""

    call: Callable[[Ledger], Any]
    #: Repeats of the group of repeated arguments in this call.
    groups: int
    #: A reply by its head, or several in turn where the method goes on -> the answer of the method, as text.
    replies: dict[tuple[str, ...] | tuple[tuple[str, ...], ...], str]


def submit(ledger: Ledger) -> Any:
    return ledger.submit("job", "cpus=1000,slots=1", 7, b"{}")


def submit_many(ledger: Ledger) -> Any:
    rows = [(job, "cpus=1000,slots=1", 7, b"{}", 0, 0, 0) for job in ("a", "b")]
    return ledger.submit_many(rows)


def release(ledger: Ledger) -> Any:
    # The header's list has one result for each job.
    results = (("key", 60, b"text"),)
    ended = [
        Ended("a", Token(1, 1), Outcome.SUCCEEDED, "", "", results),
        Ended("b", Token(1, 2), Outcome.LOST, "gone", "", results),
    ]
    return ledger.settle("w", "life", ended=ended, most_losses=3, nonce="n")


def claim(ledger: Ledger) -> Any:
    return ledger.settle(
        "w", "life", arrived=[Arrived("a", Token(1, 1), "n1"), Arrived("b", Token(1, 1), "n2")], most_losses=3
    )


#: An attempt that is not adopted.
STALE: Final = "[('a', Token(epoch=1, attempt=1))]"


def adopt(ledger: Ledger) -> Any:
    adopted = Adopted("a", Token(1, 1), "cpus=1000,slots=1", 7, 1, 2, "n", 0)
    return ledger.adopt("w", "life", [adopted, adopted])


def refill(ledger: Ledger) -> Any:
    return ledger.refill("s", None, [("a", "s", 1, b"{}", 0, 0, 0), ("b", "s", 2, b"{}", 0, 0, 0)])


#: Jobs in the list of a worker.
HELD: Final = ("a", "b", "c")
CONTROLS: Final = {("cordon", "a"): "draining", ("pause", "queue:mail"): ""}
VIEW: Final = {"cpus": "4", "pid": "7"}

BINDINGS: Final = {
    "adopt": Binding(adopt, 2, {("ok", "", "adopted", "stale"): STALE, ("unknown",): f"{STALE[:-1]}, {STALE[1:]}"}),
    "begin_refill": Binding(
        lambda ledger: ledger.begin_refill(),
        0,
        {("ok", "s", "7", "", "t", "1", "9"): "{'s': (7, None), 't': (1, 9)}"},
    ),
    "cancel": Binding(
        lambda ledger: ledger.cancel("a", State.CANCELLED, "revoked"),
        0,
        {
            ("ended", "3-0", ""): "Cancelled(verdict='ended', worker=None, entry='3-0')",
            ("held", "running", "w"): "Cancelled(verdict='held', worker='w', entry=None)",
            ("over",): "Cancelled(verdict='over', worker=None, entry=None)",
            ("missing",): "Cancelled(verdict='missing', worker=None, entry=None)",
            ("unsure",): "Cancelled(verdict='unsure', worker=None, entry=None)",
        },
    ),
    "claim": Binding(
        claim,
        2,
        {
            ("ok", "claimed", "1", "2", "3-0", "1", "0", "1", "9", "stale", "", "", "", "0", "", "", ""): (
                "[Claimed(job='a', token=Token(epoch=1, attempt=1), verdict='claimed', admitted_ms=1, started_ms=2, "
                "entry='3-0', losses=1, rerun=False, revoked=True, submitted_ms=9), "
                "Claimed(job='b', token=Token(epoch=1, attempt=1), verdict='stale', admitted_ms=None, "
                "started_ms=None, entry='', losses=0, rerun=True, revoked=False, submitted_ms=0)]"
            )
        },
    ),
    "close_epoch": Binding(lambda ledger: ledger.close_epoch(5, "run", "remove", [b"x", b"y"]), 2, {("ok",): "None"}),
    "compare_jobs": Binding(lambda ledger: ledger.compare_jobs("a waiting 1.0 -"), 0, {("ok", "a", "b"): "['a', 'b']"}),
    "expire_lease": Binding(
        lambda ledger: ledger.expire_lease("w", "life"), 0, {("ok",): "None", ("unknown",): "None"}
    ),
    # First of all nothing is named.
    "drain": Binding(lambda ledger: ledger.drain("w", "life"), 0, {("ok", "s", "t"): "2", ("unknown",): "0"}),
    "remove_job": Binding(
        lambda ledger: ledger.remove_job("a", Token(1, 1), final=True),
        0,
        {("ok", "w"): "True", ("ok", ""): "True", ("changed",): "False"},
    ),
    "elect": Binding(
        lambda ledger: ledger.elect("life", 0, 5.0, ["suspicion"], "w"),
        1,
        {
            ("elected", "7", "1", "3", "suspicion"): ("Elected(fence=3, asked=('suspicion',), epoch=7, has_book=True)"),
            ("other", "0", "0"): "Elected(fence=0, asked=(), epoch=0, has_book=False)",
        },
    ),
    "fill": Binding(
        lambda ledger: ledger.fill("w"), 0, {(("ok", "2", "9", "v"), ("ok", "1", "", ""), ("ok", "1", "", "")): "3"}
    ),
    "find_low": Binding(lambda ledger: ledger.find_low(), 0, {(("ok", "2"), ("ok", "0")): "None"}),
    "find_room": Binding(
        lambda ledger: list(ledger.find_room()),
        0,
        {(("ok", "7", "s", "w"), ("ok", "", "t", "")): "[('s', 'w'), ('t', '')]"},
    ),
    "finish_epoch": Binding(lambda ledger: ledger.finish_epoch(5), 0, {("ok",): "None"}),
    "ack_transitions": Binding(
        lambda ledger: ledger.ack_transitions([("3-0", "a"), ("4-0", "b")]), 2, {("ok", "2"): "2"}
    ),
    "lapse": Binding(
        lambda ledger: ledger.lapse("w", 15_000, 3),
        0,
        {
            ("alive", "life"): "Lapsed(verdict='alive', incarnation='life', taken_back=0)",
            ("closed", "life"): "Lapsed(verdict='closed', incarnation='life', taken_back=0)",
            ("waits", "life"): "Lapsed(verdict='waits', incarnation='life', taken_back=0)",
            ("due", "life"): "Lapsed(verdict='due', incarnation='life', taken_back=0)",
            (("more", "life"), ("more", "life", "s", "s"), ("gone", "life", "t")): (
                "Lapsed(verdict='gone', incarnation='life', taken_back=3)"
            ),
            ("unknown",): "Lapsed(verdict='unknown', incarnation=None, taken_back=0)",
        },
    ),
    "leave": Binding(
        lambda ledger: ledger.leave("w", "life"), 0, {("ok",): "0", ("held", "3"): "3", ("unknown",): "0"}
    ),
    "unblock_carried": Binding(
        lambda ledger: ledger.unblock_carried(
            [("a", Token(1, 2), "succeeded", "1"), ("b", Token(1, 2), "running", "held")]
        ),
        2,
        {("ok", "2"): "2"},
    ),
    "repair_queue": Binding(
        lambda ledger: ledger.repair_queue("s", "a"), 0, {("ok", "1"): "True", ("ok", "0"): "False"}
    ),
    "open_epoch": Binding(
        lambda ledger: ledger.open_epoch(5, None, 3, control_groups(CONTROLS)), 2, {("ok", "7"): "None"}
    ),
    "reprioritize": Binding(
        lambda ledger: ledger.reprioritize([("a", 7, ""), ("b", 8, "s")]),
        2,
        {("ok", "moved", "staying"): "['moved', 'staying']", ("ok", "held", "missing"): "['held', 'missing']"},
    ),
    "resume_shapes": Binding(lambda ledger: ledger.resume_shapes(), 2, {("ok", "2"): "2"}),
    "set_controls": Binding(
        lambda ledger: ledger.set_controls(3, CONTROLS, last=True), 2, {("ok",): "True", ("older",): "False"}
    ),
    "find_misplaced": Binding(lambda ledger: ledger.find_misplaced("s", 500, 500), 0, {("ok", "7", "a"): "(7, ['a'])"}),
    "place_shape": Binding(
        lambda ledger: ledger.place_shape("s"),
        0,
        {
            (
                ("admitted", "a", "w", "2", "v"),
                ("more", "9", "x", ""),
                ("none", ""),
            ): "[Placed(job='a', worker='w', attempt=2)]"
        },
    ),
    "recount": Binding(
        lambda ledger: ledger.recount(["w"]), 0, {("ok", "2"): "[2]", ("unknown", "1"): "[1]", ("many",): "[7]"}
    ),
    "hand_over_again": Binding(
        lambda ledger: ledger.hand_over_again("w", "life", ["x", "y"]),
        len(HELD),
        {("ok", "a", *CARD): "HandedOver(job='a', token=Token(epoch=1, attempt=1)", ("unknown",): "[]"},
    ),
    "redeliver": Binding(lambda ledger: ledger.redeliver(), 0, {(("ok", "100", "60"), ("ok", "1", "1")): "61"}),
    "register": Binding(
        lambda ledger: ledger.register("w", "life", "queue", "cpus=4000,slots=4", VIEW),
        2,
        {
            ("ok",): "Filled(admitted=0)",
            ("taken", "other", "-5", "2"): "Taken(incarnation='other', lease_left_ms=-5, held=2)",
            (("many",), ("ok",)): "Filled(admitted=0)",
        },
    ),
    "release": Binding(
        release,
        2,
        {
            ("ok", "", "v", "", "released", "succeeded", "3-0", "s", "repeat", "lost", "", "", "c", *CARD): (
                "verdict='released', state='succeeded', entry='3-0')"
            ),
            ("ok", "", "", "", "stale", "", "", "", "released", "waiting", "4-0", "s"): (
                "verdict='released', state='waiting', entry='4-0')"
            ),
        },
    ),
    "renew": Binding(
        lambda ledger: ledger.renew("w", "life", VIEW, ["x", "y"], 3),
        2,
        {
            ("ok", "0", "0", "0"): "Renewed(known=True, taken_back=0)",
            ("ok", "1", "3", "0"): "Renewed(known=True, taken_back=0)",
            ("unknown",): "Renewed(known=False",
        },
    ),
    "refill": Binding(refill, 2, {("ok", "2", "5"): "5", ("late", "5"): "None"}),
    "reserve_book": Binding(
        lambda ledger: ledger.reserve_book("w", "life", "cpus=4000,slots=4"),
        0,
        {("ok",): "True", ("open",): "False", (("many",), ("ok",)): "True"},
    ),
    "reserve": Binding(
        lambda ledger: ledger.reserve(Reservation("w", "s", 7, 0, {"cpus": 1}, 5), {"cpus": 2}, ["v", "w"]),
        0,
        {("ok",): "True", ("changed",): "False"},
    ),
    "unreserve": Binding(lambda ledger: ledger.unreserve("s", ["v"]), 0, {("ok", "w"): "w"}),
    "revoke": Binding(lambda ledger: ledger.revoke("a"), 0, {("held", "w"): "True", ("free",): "False"}),
    "repair_job": Binding(lambda ledger: ledger.repair_job("a"), 0, {("ok", "2"): "2", ("no_book", "w"): "None"}),
    "submit": Binding(
        submit,
        0,
        {
            ("admitted", "w", "1"): "Submitted(state='admitted', worker='w', attempt=1, was=None)",
            ("waiting", "", "", ""): "Submitted(state='waiting', worker=None, attempt=None, was=None)",
            ("exists", "running"): "Submitted(state='exists', worker=None, attempt=None, was='running')",
            ("left",): "Submitted(state='left', worker=None, attempt=None, was=None)",
            ("late", "5"): "Submitted(state='late', worker=None, attempt=None, was=None)",
        },
    ),
    "submit_many": Binding(submit_many, 2, {("ok", "1", "1", "", "s", "9", "x"): "1", ("late", "5"): "0"}),
    "note_successor": Binding(
        lambda ledger: ledger.note_successor("a", b"next"), 0, {("ok",): "True", ("missing",): "False"}
    ),
    "take_back_missing": Binding(
        lambda ledger: ledger.take_back_missing("w", "life", ["x"], 3, 10_000),
        len(HELD),
        {("ok", "s", "t"): "['s', 't']", ("unknown",): "[]"},
    ),
    "prune_held": Binding(lambda ledger: ledger.prune_held("w"), len(HELD), {("ok", "2"): "2"}),
    "count_held": Binding(lambda ledger: ledger.count_held(["w"]), len(HELD), {("ok", "2"): "2"}),
    "prune_index": Binding(lambda ledger: ledger.prune_index("gpus", 5, 500), 0, {("ok", "7", "2"): "(7, 2)"}),
    "age_shares": Binding(lambda ledger: ledger.age_shares({"cpus": 1000, "slots": 1}), 2, {("ok",): "None"}),
    "set_tight": Binding(lambda ledger: ledger.set_tight(True), 0, {("ok",): "None"}),
    "set_use": Binding(
        lambda ledger: ledger.set_use({"a/cpus": (1, 2), "b/cpus": (0, 3)}, "0-0"), 2, {("ok", "2"): "2"}
    ),
    "set_waiting": Binding(lambda ledger: ledger.set_waiting(1, 2), 0, {("ok",): "True", ("changed",): "False"}),
    "set_total": Binding(lambda ledger: ledger.set_total(1, 2), 0, {("ok",): "True", ("changed",): "False"}),
}

#: Replies of other scripts that a method calls after its own: nothing is there to be done.
QUIET: Final = {
    "drain": ["ok"],
    "fill": ["ok", "0", "", ""],
    "find_room": ["ok", ""],
    "place_shape": ["none", ""],
    "take_back_missing": ["ok"],
    "prune_held": ["ok", "0"],
}


class Recording(Ledger):
    """A ledger that notes what it would send, and answers with the replies of the test."""

    def __init__(self, settings: Settings, script: str, replies: Sequence[Sequence[str]]) -> None:
        super().__init__(settings, redis.Redis())
        self._run_id = "run"
        self.epoch = 1
        self.sent: list[tuple[str, Sequence[Any]]] = []
        self._script = script
        self._replies = [list(reply) for reply in replies]

    def _scan_held(self, worker: str, cursor: int, count: int) -> tuple[int, list[str]]:
        return 0, list(HELD)

    def _recount_unchanged(self, worker: str) -> int | None:
        return 7

    def _held_sum(self, worker: str) -> str:
        return "cpus=1000,slots=1"

    def _withheld(self) -> list[str]:
        return ["s", "t"]

    def _named_again(self, worker: str, absent: set[str]) -> None:
        assert absent == set(HELD)

    def _calls(self, calls: Sequence[tuple[str, Sequence[Any]]]) -> list[list[str]]:
        self.sent += calls
        return [self._replies.pop(0) if name == self._script and self._replies else QUIET[name] for name, _ in calls]


@pytest.fixture(scope="module")
def settings_without_servers() -> Settings:
    return Settings.from_environ({})


def in_turn(replies: tuple[Any, ...]) -> list[tuple[str, ...]]:
    return list(replies) if isinstance(replies[0], tuple) else [replies]


def shown(value: Any) -> str:
    """Return a value as text, in which a verdict or a state is its word."""
    return re.sub(r"<\w+\.\w+: ('\w*')>", r"\1", str(value))


def assembled(name: str) -> str:
    """Return the code of a script with the functions of the library that it uses, without comments."""
    functions = scripts._functions()
    body = scripts.body(name)
    return re.sub(r"--[^\n]*", "", "".join(functions[used] for used in scripts._used(body, functions)) + body)


@pytest.mark.parametrize("name", NAMES)
def test_a_header_has_all_its_fields(name: str) -> None:
    header = scripts.header(name)
    assert tuple(header) == scripts.HEADER_FIELDS
    assert all(header.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_keys_in_a_header_are_those_that_the_script_uses(name: str) -> None:
    listed = scripts.header(name)["KEYS"].removeprefix("none; by name: ").split(", ")
    assert sorted(listed) == sorted(set(re.findall(r"\bKEY\.(\w+)", assembled(name))))
    assert set(listed) <= keys.KEYS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_script_uses_no_search_of_keys_no_clock_and_no_chance(name: str) -> None:
    code = assembled(name)
    commands = set(re.findall(r"redis\.p?call\('(\w+)'", code))
    assert not commands & {"KEYS", "SCAN", "SSCAN", "HSCAN", "ZSCAN", "FLUSHDB", "FLUSHALL", "RANDOMKEY", "WAIT"}
    assert len(re.findall(r"redis\.p?call\(", code)) == len(re.findall(r"redis\.p?call\('\w+'", code))
    assert not re.search(r"(?<!redis\.)\b(os|math\.random\w*|pcall|loadstring|dofile)\b", code)


#: A function of the library in a loaded script, which has no comments: its name and its text.
FUNCTION: Final = re.compile(r"^local function (\w+)\(.*?^end\n", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", NAMES)
def test_loaded_script_calls_each_function_that_it_holds(name: str) -> None:
    text = scripts.load(15_000, 60_000, 10_000, True)[name].text
    # A function stands behind those that it uses, so a used one is called in the text behind its own end.
    unused = [function[1] for function in FUNCTION.finditer(text) if f"{function[1]}(" not in text[function.end() :]]
    assert unused == []


#: Lines of a script as it is sent. A script that searches for a worker, or goes through the waiting shapes, is longer.
#: A function that only lazy functions use stands in each of them.
MOST_LINES: Final = 450
MOST_LINES_OF: Final = {
    "drain": 535, "fill": 1150, "find_room": 460, "lapse": 580, "place_shape": 890, "refill": 1250, "release": 1560,
    "submit": 1250, "submit_many": 1270, "take_back_missing": 545
}  # fmt: skip


def test_sent_script_is_no_longer_than_its_bound() -> None:
    lines = {name: script.text.count("\n") for name, script in scripts.load(15_000, 60_000, 10_000, True).items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES_OF.get(name, MOST_LINES)} == {}


def test_each_function_of_the_library_is_in_a_script() -> None:
    texts = [script.text for script in scripts.load(15_000, 60_000, 10_000, True).values()]
    assert [name for name in scripts._functions() if not any(f"local function {name}(" in text for text in texts)] == []


@pytest.mark.parametrize("name", NAMES)
def test_script_reads_its_arguments_by_the_names_in_its_header(name: str) -> None:
    code = assembled(name)
    signature = scripts.signature(name)
    assert all(re.fullmatch("[a-z_]+", argument) for argument in [*signature.once, *signature.each, *signature.inner])
    written = re.sub(r"--[^\n]*", "", scripts.source(name))
    assert not re.findall(r"ARGV\[(?:\w+ \+ )?\d|for \w+ = \d+, #ARGV|unpack\(ARGV, \d", written)
    read = set(re.findall(r"(?<![.'\w])[a-z_]+\b(?!')", written))
    assert set(signature.once) - read <= ({"epoch", "run_id"} if signature.has_gate else set())
    assert set(re.findall(r"\bINNER\.(\w+)", code)) - {"step"} == set(signature.inner)
    whole = "unpack(ARGV, EACH.first)" in code
    assert whole or set(re.findall(r"\bEACH\.(\w+)", code)) - {"first", "step"} == set(signature.each)


@pytest.mark.parametrize("name", NAMES)
def test_reply_of_a_script_has_the_fields_in_its_header(name: str) -> None:
    replies = scripts.signature(name).replies
    for head, fields in re.findall(r"return \{'(\w+)'((?:, [^,{}()]+(?:\([^()]*\))?)*)\}", assembled(name)):
        if head in replies:
            assert re.sub(r"\([^()]*\)", "", fields).count(", ") == len(replies[head])


def test_call_with_other_names_than_the_header_is_refused() -> None:
    signature = scripts.signature("claim")
    caller = {"epoch": 1, "run_id": "r", "worker": "w", "incarnation": "i"}
    group = {"job": "j", "token": "1.1", "nonce": "n", "digest": "d"}
    assert signature.arguments(caller, [group]) == [1, "r", "w", "i", "j", "1.1", "n", "d"]
    for values, groups in (
        ({**caller, "worker_name": "w"}, [group]),
        ({**caller, "wrong": caller["worker"]} | {"worker": None}, [group]),
        (caller, [{**group, "nonce_": "n"}]),
        ({name: value for name, value in caller.items() if name != "worker"}, [group]),
    ):
        with pytest.raises(TypeError, match="are needed"):
            signature.arguments(values, groups)


@pytest.mark.parametrize("name", NAMES)
def test_every_script_loads_on_the_server(name: str, redis_client: redis.Redis) -> None:
    about: Any = redis_client.info("server")
    script = scripts.load(15_000, 60_000, 10_000, int(about["redis_version"].split(".")[0]) >= 7)[name]
    assert redis_client.script_load(script.text) == script.sha
    assert not re.search(r"\b(KEY|STEP|LIMIT|EACH|INNER)\.", script.text)


def test_every_script_is_called_by_exactly_one_method_of_the_ledger() -> None:
    assert sorted(BINDINGS) == list(NAMES)
    module = Path(str(bindings.__file__))
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(module.parent.glob("*.py")))
    called = re.findall(r"_(?:call|counted|prepared)\(\s*\"(\w+)\"", text)
    # A long list is recounted by this script too, in a transaction.
    called.remove("recount")
    assert sorted(called) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_binding_sends_as_many_arguments_as_the_header_lists(name: str, settings_without_servers: Settings) -> None:
    binding = BINDINGS[name]
    ledger = Recording(settings_without_servers, name, in_turn(next(iter(binding.replies))))
    binding.call(ledger)
    sent = next(arguments for script, arguments in ledger.sent if script == name)
    signature = scripts.signature(name)
    assert len(sent) == len(signature.once) + (len(signature.each) + len(signature.inner)) * binding.groups


@pytest.mark.parametrize("name", NAMES)
def test_the_binding_handles_each_reply_that_the_header_lists_and_no_other(
    name: str, settings_without_servers: Settings
) -> None:
    listed = scripts.signature(name).replies.keys()
    binding = BINDINGS[name]
    handled = {reply[0] for replies in binding.replies for reply in in_turn(replies)}
    assert handled == listed - GATES
    assert ("cold" in listed) == (name not in WITHOUT_GATE)
    assert scripts.signature(name).has_gate == ("cold" in listed and name != "close_epoch")
    for replies, made in binding.replies.items():
        assert made in shown(binding.call(Recording(settings_without_servers, name, in_turn(replies))))


def test_scripts_run_on_a_full_server_unless_they_bring_jobs_in() -> None:
    flagged = {name for name in NAMES if "allow-oom" in (scripts.FLAGS.match(scripts.source(name)) or [""])[0]}
    # Scripts that admit run, too. Only running jobs give back what the backlog takes up, and there are no more of them
    # than fit.
    assert flagged == set(NAMES) - {"submit", "submit_many", "refill"}
