"""The Lua scripts of the ledger: read from `lua/`, completed, and ready to be sent.

Each file in `lua/jobs`, `workers`, `backlog`, `repair` and `epoch` is one operation and begins with a header (does,
KEYS, ARGV, replies, cost, repeat). The loader puts the functions of `lua/lib` that the operation uses in front of it.
Unused functions and comments are left out, because the server spends time on them at every call. The server makes all
functions of a script anew at every call, so those that only functions of `LAZY` use are made inside these, once they
run.

The loader replaces KEY (`routing.ledger.keys`), STEP (`routing.model.states`) and LIMIT (`routing.policy.placement` and
the settings) by their values, so that every name and number has one place. It makes a local of each argument that the
header names, and replaces EACH and INNER by the places of the repeated ones (`routing.ledger.signatures`). A script
whose arguments begin with an epoch gets the check that the caller is of this epoch.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Final

from celery_capacity.routing import format_versions
from celery_capacity.routing.ledger import signatures
from celery_capacity.routing.ledger.keys import HEAD_LINES, KEYS
from celery_capacity.routing.ledger.signatures import Signature
from celery_capacity.routing.model.amounts import DEFAULT_QUEUE, LABEL
from celery_capacity.routing.model.states import Step
from celery_capacity.routing.policy.amount_classes import CLASS_SPAN
from celery_capacity.routing.policy.placement import CANDIDATES, MAX_ADMITTED, SHAPES, SUBMISSIONS
from celery_capacity.routing.policy.tenants import mean_time
from celery_capacity.routing.policy.unknown_starts import FEWEST_LOSSES

#: Candidates that a submit fetches first. It fetches the others only where none of these has room.
FEW: Final = 4

#: The most jobs of one shape whose changes a submit keeps until it writes them together. Lua can give a command no
#: more than 8,000 arguments.
MAX_BATCH: Final = 1000

#: Workers that one script looks at for many jobs together, in some 2 ms. Later jobs are placed by separate scripts.
SEARCHED: Final = 8 * CANDIDATES

#: Waiting jobs of each shape that the ledger may hold, however many wait in all. Below, a shape would often run out of
#: them before others are fetched.
LEAST_WAITING: Final = 20
#: Waiting jobs of all shapes that are fetched where the backlog of the ledger has no limit.
UNLIMITED_SHARE: Final = 10_000

#: Jobs of a worker whose amounts one script adds up, in some 2 ms. More jobs are counted in pages.
HELD: Final = 500

#: Milliseconds for which a catalogue of tasks outlives the last heartbeat of its workers: a day.
CATALOGUE_MS: Final = 86_400_000

#: The most bytes of a message that a release may hand over to the worker that asks. Larger ones go by the broker.
HAND_OVER_BYTES: Final = 65_536

#: Bytes of a job's value that are read for its head: more than nearly any head has, and little of its message.
HEAD_BYTES: Final = 512
#: Bytes for which the head of an admitted job has room: the entry, time and nonce of its claim.
HEAD_ROOM: Final = 80


def _shared_bodies() -> Iterator[str]:
    """Yield the body of a call without arguments, and the ends of other bodies, in base64 as messages have them."""
    end = b'"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
    yield base64.b64encode(b"[[], {}, {" + end).decode()
    for skipped in range(3):
        # Three bytes are four characters, so a text looks different where one or two bytes are before it.
        yield base64.b64encode(end[skipped:]).decode()


#: Bytes of the largest message of a waiting job that is packed: of a larger one little is the same in other messages.
PACKED_BYTES: Final = 4096
#: Texts that nearly all messages share, in their order there: the body of a call without arguments, or the end of any
#: body in the three places where it may begin in base64, and what lies between the values in headers and properties.
#: The value of a waiting job has one byte for each of them, so a change is a change of the books' format.
SHARED_TEXTS: Final = (
    *_shared_bodies(),
    '","content-encoding":"utf-8","content-type":"application/json","headers":{"lang":"py","task":"',
    ',"shadow":null,"eta":null,"expires":null,"group":null,"group_index":null,"retries":0,"timelimit":[null,null],'
    '"root_id":',
    ',"parent_id":null,"argsrepr":"',
    ',"ignore_result":false,"replaced_task_nesting":0,"stamped_headers":null,"stamps":{},"capacity_request":{"shape":"',
    ',"declared":true,"format":1}},"properties":{"correlation_id":',
    ',"delivery_mode":2,"delivery_info":{"exchange":"","routing_key":"',
    ',"priority":0,"body_encoding":"base64"}}',
)

#: Tenants among which one script chooses: those whose waiting jobs come first. The next passes take the others' jobs.
TENANTS_IN_TURN: Final = 256

#: The folders of the operations.
FOLDERS: Final = ("jobs", "workers", "backlog", "repair", "epoch")
#: The files of `lua/lib`, with the functions that the operations share. A function stands behind those that it uses.
LIBRARY: Final = (
    "values", "book", "labels", "times", "alternatives", "opening", "classes", "indexes", "candidates", "spread",
    "search", "job", "transitions", "border", "beside", "queues", "tenants", "quotas", "shares", "turns", "reservation",
    "controls", "admit", "requeue", "batches", "admit_or_file", "held", "exclusive", "shapes_to_try", "next_turn",
    "kept_shape", "fill_pass",
)  # fmt: skip
#: Functions that many calls do not reach, or reach once. The functions that only such ones use stand inside them.
LAZY: Final = frozenset({
    "allows", "ask_for_more", "count_use", "enter", "file", "fill_pass", "find_worker", "give_use_back",
    "is_kept_elsewhere", "kept_shape", "leave_behind", "next_by_turns", "note_start", "open_spread", "passing_worker",
    "put_back", "quota_of", "read_tenants", "shapes_below_quota", "way_to_start",
})  # fmt: skip
_LUA: Final = files("celery_capacity.routing").joinpath("lua")

HEADER_FIELDS: Final = ("Does", "KEYS", "ARGV", "Replies", "Cost", "Repeat")
FLAGS: Final = re.compile(r"\A#!lua[^\n]*\n")
#: Replacement for `flags=allow-oom` on Redis 6.2: the removal of a key that never exists. A full server of that
#: version lets a script go on where its first write takes up no memory.
BEFORE_FLAGS: Final = "redis.call('del', 'ledger:no')\n"


@dataclass(frozen=True, slots=True)
class Script:
    """An operation: its whole text as the server gets it, and the digest by which the server finds it."""

    name: str
    text: str
    sha: str
    signature: Signature


def names() -> tuple[str, ...]:
    """Return the names of the operations, which are those of their files."""
    return tuple(sorted(_files()))


@lru_cache(maxsize=1)
def _files() -> dict[str, Traversable]:
    """Return the files of the operations, by name."""
    entries = (entry for folder in FOLDERS for entry in _LUA.joinpath(folder).iterdir())
    return {entry.name[:-4]: entry for entry in entries if entry.name.endswith(".lua")}


def source(name: str) -> str:
    """Return the text of an operation's file."""
    return _files()[name].read_text(encoding="utf-8")


def library() -> str:
    """Return the text of the functions that the operations share."""
    return "\n".join(_LUA.joinpath("lib", f"{name}.lua").read_text(encoding="utf-8") for name in LIBRARY)


def header(name: str) -> dict[str, str]:
    """Return the header of a script: field -> text, lines joined."""
    fields: dict[str, str] = {}
    field = None
    for line in FLAGS.sub("", source(name)).splitlines():
        if not line.startswith("--"):
            break
        text = line[2:].strip()
        named = re.match(r"(\w+): (.*)", text)
        if named and named.group(1) in HEADER_FIELDS:
            field = named.group(1)
            fields[field] = named.group(2)
        elif field:
            fields[field] += " " + text
    return fields


@lru_cache(maxsize=64)
def signature(name: str) -> Signature:
    """Return the names of a script's arguments and replies."""
    fields = header(name)
    return signatures.parse(fields["ARGV"], fields["Replies"])


#: A function of the library: its comment, its head, and everything up to the `end` at the start of a line.
_FUNCTION: Final = re.compile(r"(?:^--[^\n]*\n)*^local function (\w+)\(.*?^end\n", re.MULTILINE | re.DOTALL)
_VALUE: Final = re.compile(r"\b(KEY|STEP|LIMIT|EACH|INNER)\.(\w+)\b")
_COMMENT: Final = re.compile(r"^\s*--[^\n]*\n", re.MULTILINE)


#: Check in front of a script that acts in an epoch only; and the call that also reads facts about the epoch.
_GATE: Final = """local no = refused(epoch, run_id)
if no then
  return no
end
"""
_GATE_WITH_FACTS: Final = _GATE.replace("no = refused(", "no, facts = refused_or_facts(")


def body(name: str) -> str:
    """Return the code of an operation, which begins with its arguments and with the check of the caller's epoch."""
    code, arguments = FLAGS.sub("", source(name)), signature(name)
    if arguments.once:
        values = ", ".join(f"ARGV[{number}]" for number in range(1, len(arguments.once) + 1))
        gate = _GATE_WITH_FACTS if re.search(r"\bfacts\b", _COMMENT.sub("", code)) else _GATE
        gate = gate if arguments.has_gate else ""
        code = f"local {', '.join(arguments.once)} = {values}\n{gate}{code}"
    return code


@lru_cache(maxsize=1)
def _functions() -> Mapping[str, str]:
    """Return the functions of the library by name, in their order."""
    return {match.group(1): match.group(0) for match in _FUNCTION.finditer(library())}


@lru_cache(maxsize=1)
def _bare_functions() -> Mapping[str, str]:
    """Return the functions of the library without their comments."""
    return {name: _COMMENT.sub("", text) for name, text in _functions().items()}


def _used(code: str, functions: Mapping[str, str]) -> list[str]:
    """Return the names of the functions that the code uses, directly or not, in the order of the library."""
    used: set[str] = set()
    texts = [code]
    while texts:
        new = _callees(texts.pop(), functions) - used
        used |= new
        texts += [functions[name].split("\n", 1)[1] for name in new]
    return [name for name in functions if name in used]


def _callees(code: str, functions: Mapping[str, str]) -> set[str]:
    """Return the names of the functions that the code calls by itself."""
    return set(_called(code) & functions.keys())


@lru_cache(maxsize=1024)
def _called(code: str) -> frozenset[str]:
    return frozenset(re.findall(r"\b(\w+)\(", code))


@lru_cache(maxsize=1)
def _functions_called() -> Mapping[str, frozenset[str]]:
    """Return for each function of the library the others that it calls by itself."""
    functions = _bare_functions()
    return {name: frozenset(_callees(text.split("\n", 1)[1], functions) - {name}) for name, text in functions.items()}


def _with_library(code: str) -> str:
    """Return the code behind the functions that it uses, without comments. Functions of `LAZY` have theirs inside.

    A function that only several functions of `LAZY` use stands in each of them.
    """
    functions, called = _bare_functions(), _functions_called()
    used = _used(code, functions)

    def texts(names: frozenset[str] | set[str], outer: frozenset[str]) -> str:
        """Return these functions, and those that they use, in the library's order; without those of outer scopes."""
        inside: set[str] = set()
        new = set(names) - outer
        while new:
            inside |= new
            new = {other for name in new if name not in LAZY for other in called[name]} - inside - outer
        return "".join(nested(name, outer | inside) for name in used if name in inside)

    def nested(name: str, outer: frozenset[str]) -> str:
        if name not in LAZY:
            return functions[name]
        head, rest = functions[name].split("\n", 1)
        return f"{head}\n{texts(called[name], outer)}{rest}"

    return texts(_callees(code, functions), frozenset()) + _COMMENT.sub("", code)


@lru_cache(maxsize=8)
def load(
    start_ms: int, tombstone_ms: int, max_ledger_backlog: int, flags: bool, share_halves_in: float = 0.0
) -> dict[str, Script]:
    """Return all scripts, by name.

    `start_ms`: milliseconds after which an unclaimed message is delivered again. `tombstone_ms`: milliseconds for which
    an ended job is remembered after Postgres has its end. `max_ledger_backlog`: waiting jobs that the ledger holds, 0
    for no limit. `flags`: True if the server reads the line `#!lua flags=...`. Redis 7 and Valkey do. Redis 6.2 takes
    it for an error, and gets `BEFORE_FLAGS` instead. `share_halves_in`: seconds in which the past use of a tenant
    halves, 0 where it does not count.
    """
    values: dict[str, dict[str, Any]] = {
        "KEY": {name: repr(key) for name, key in KEYS.items()},
        "STEP": {step.name.lower(): step.value for step in Step},
        "LIMIT": {
            "candidates": CANDIDATES,
            "few": FEW,
            "batch": MAX_BATCH,
            "shapes": SHAPES,
            "most": MAX_ADMITTED,
            "searched": SEARCHED,
            "span": CLASS_SPAN,
            "held": HELD,
            "catalogue": CATALOGUE_MS,
            "tombstone": tombstone_ms,
            "submit_limit": tombstone_ms // 2,
            "start": start_ms,
            "hand_over": HAND_OVER_BYTES,
            "head": HEAD_BYTES,
            "room": repr(" " * HEAD_ROOM),
            "packed": PACKED_BYTES,
            "texts": "{" + ", ".join(map(repr, SHARED_TEXTS)) + "}",
            "job": repr("^" + "([^\n]*)\n" * len(HEAD_LINES) + " *\n()"),
            "format": format_versions.LEDGER,
            "doubt": FEWEST_LOSSES,
            "backlog": max_ledger_backlog,
            "share": max_ledger_backlog or UNLIMITED_SHARE,
            "least": LEAST_WAITING,
            "unlabelled": repr(LABEL + DEFAULT_QUEUE),
            "submissions": SUBMISSIONS,
            "tenants": TENANTS_IN_TURN,
            "share_time": repr(mean_time(share_halves_in)),
        },
    }
    scripts = {}
    for name in names():
        first = FLAGS.match(source(name))
        code = body(name)
        values_by_kind = values | signature(name).positions()
        text = _VALUE.sub(partial(_value, values_by_kind), _with_library(code))
        if first:
            text = (first.group(0) if flags else BEFORE_FLAGS) + text
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        scripts[name] = Script(name, text, sha, signature(name))
    return scripts


def _value(values: Mapping[str, Mapping[str, Any]], match: re.Match[str]) -> str:
    return str(values[match.group(1)][match.group(2)])
