"""The Lua scripts of the ledger: read from `lua/`, completed, and ready to be sent.

Each file in `lua/jobs`, `workers`, `backlog`, `repair` and `epoch` is one operation and begins with a header (does,
KEYS, ARGV, replies, cost, repeat). In front of each go those functions of `lua/lib` that it uses, without comments,
since server time is spent on each at every call. For KEY (`routing.ledger.keys`), STEP (`routing.model.states`) and
LIMIT (`routing.policy.placement` and the settings) stand their values, so that every name and number has one place.
For ARG, EACH and INNER stand the places of the arguments (`routing.ledger.signatures`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Final

from celery_capacity.routing.ledger import signatures
from celery_capacity.routing.ledger.keys import KEYS
from celery_capacity.routing.ledger.signatures import Signature
from celery_capacity.routing.model import format_versions
from celery_capacity.routing.model.amounts import DEFAULT_QUEUE, LABEL
from celery_capacity.routing.model.states import Step
from celery_capacity.routing.policy.placement import CANDIDATES, FREED_PASSES, MOST_ADMITTED, SHAPES
from celery_capacity.routing.policy.unknown_starts import FEWEST_LOSSES

#: Candidates that a submit fetches first; the others only when none of these has room.
FEW: Final = 4

#: Jobs of one shape, at the most, whose changes a submit keeps until it writes them together. (Lua gives a command
#: 8,000 arguments at the most.)
RUN: Final = 1000

#: Workers that one script looks at for many jobs together: some 2 ms. For the jobs behind, scripts of their own look.
SEARCHED: Final = 8 * CANDIDATES
#: Passes of one script over all workers that come to be kept no more by it.
MOST_FREED_PASSES: Final = 2 * FREED_PASSES

#: Jobs of a worker whose amounts one script adds up, in some 2 ms; more are counted in pages.
HELD: Final = 500

#: Bytes of a message that a release may give back to the worker that is asking; larger ones go by the broker.
HAND_OVER_BYTES: Final = 65_536

#: The folders of the operations.
FOLDERS: Final = ("jobs", "workers", "backlog", "repair", "epoch")
#: The files of `lua/lib`, with what the operations share: a function stands behind those that it uses.
LIBRARY: Final = (
    "values", "book", "indexes", "search", "transitions", "queues", "grant", "requeue", "runs", "take_in", "held",
    "exclusive", "candidates", "fill_one", "fill",
)  # fmt: skip
_LUA: Final = files("celery_capacity.routing").joinpath("lua")

HEADER_FIELDS: Final = ("Does", "KEYS", "ARGV", "Replies", "Cost", "Repeat")
FLAGS: Final = re.compile(r"\A#!lua[^\n]*\n")
#: What does the same as `flags=allow-oom` on Redis 6.2, which lets a script of a full server go on where its first
#: write takes up no memory: to remove a key that there never is.
BEFORE_FLAGS: Final = "redis.call('del', 'ledger:no')\n"


@dataclass(frozen=True, slots=True)
class Script:
    """One operation: its whole text as the server gets it, and the digest under which the server knows it."""

    name: str
    text: str
    sha: str
    signature: Signature


def names() -> tuple[str, ...]:
    """The operations, by the names of their files."""
    return tuple(sorted(_places()))


@lru_cache(maxsize=1)
def _places() -> dict[str, Traversable]:
    """The files of the operations, by name."""
    entries = (entry for folder in FOLDERS for entry in _LUA.joinpath(folder).iterdir())
    return {entry.name[:-4]: entry for entry in entries if entry.name.endswith(".lua")}


def source(name: str) -> str:
    """The text of an operation's file."""
    return _places()[name].read_text(encoding="utf-8")


def library() -> str:
    """The text of what the operations share."""
    return "\n".join(_LUA.joinpath("lib", f"{name}.lua").read_text(encoding="utf-8") for name in LIBRARY)


def header(name: str) -> dict[str, str]:
    """The header of a script: field -> text, lines joined."""
    found: dict[str, str] = {}
    field = None
    for line in FLAGS.sub("", source(name)).splitlines():
        if not line.startswith("--"):
            break
        text = line[2:].strip()
        named = re.match(r"(\w+): (.*)", text)
        if named and named.group(1) in HEADER_FIELDS:
            field = named.group(1)
            found[field] = named.group(2)
        elif field:
            found[field] += " " + text
    return found


@lru_cache(maxsize=64)
def signature(name: str) -> Signature:
    """Return the names of a script's arguments and replies."""
    fields = header(name)
    return signatures.parse(fields["ARGV"], fields["Replies"])


#: A function of the library: its comment, its head, and all up to the `end` at the start of a line.
_FUNCTION: Final = re.compile(r"(?:^--[^\n]*\n)*^local function (\w+)\(.*?^end\n", re.MULTILINE | re.DOTALL)
_VALUE: Final = re.compile(r"\b(KEY|STEP|LIMIT|ARG|EACH|INNER)\.(\w+)\b")
_COMMENT: Final = re.compile(r"^\s*--[^\n]*\n", re.MULTILINE)


def _functions() -> dict[str, str]:
    """The functions of the library, in their order."""
    return {found.group(1): found.group(0) for found in _FUNCTION.finditer(library())}


def _used(body: str, functions: dict[str, str]) -> list[str]:
    """The names of the functions that a body uses, and those that they use, in the order of the library."""
    used: set[str] = set()
    texts = [body]
    while texts:
        words = set(re.findall(r"\b(\w+)\(", texts.pop()))
        new = {name for name in functions if name in words} - used
        used |= new
        texts += [functions[name].split("\n", 1)[1] for name in new]
    return [name for name in functions if name in used]


@lru_cache(maxsize=8)
def load(start_ms: int, tombstone_ms: int, flags: bool) -> dict[str, Script]:
    """All scripts, by name.

    `start_ms`: milliseconds after which an unclaimed message is delivered again. `tombstone_ms`: milliseconds for which
    an ended job is remembered after Postgres has its end. `flags`: whether the server knows
    the line `#!lua flags=...` (Redis 7 and Valkey do, 6.2 takes it for an error and gets `BEFORE_FLAGS` instead).
    """
    values: dict[str, dict[str, Any]] = {
        "KEY": {name: repr(key) for name, key in KEYS.items()},
        "STEP": {step.name.lower(): step.value for step in Step},
        "LIMIT": {
            "candidates": CANDIDATES,
            "few": FEW,
            "run": RUN,
            "shapes": SHAPES,
            "most": MOST_ADMITTED,
            "passes": FREED_PASSES,
            "freed": MOST_FREED_PASSES,
            "searched": SEARCHED,
            "held": HELD,
            "tombstone": tombstone_ms,
            "submit_within": tombstone_ms // 2,
            "start": start_ms,
            "hand_over": HAND_OVER_BYTES,
            "format": format_versions.LEDGER,
            "doubt": FEWEST_LOSSES,
            "unlabelled": repr(LABEL + DEFAULT_QUEUE),
        },
    }
    functions = _functions()
    scripts = {}
    for name in names():
        own = source(name)
        first = FLAGS.match(own)
        body = FLAGS.sub("", own)
        text = "".join(functions[used] for used in _used(body, functions)) + body
        places = values | signature(name).places()
        text = _VALUE.sub(partial(_value, places), _COMMENT.sub("", text))
        if first:
            text = (first.group(0) if flags else BEFORE_FLAGS) + text
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        scripts[name] = Script(name, text, sha, signature(name))
    return scripts


def _value(values: Mapping[str, Mapping[str, Any]], place: re.Match[str]) -> str:
    return str(values[place.group(1)][place.group(2)])
