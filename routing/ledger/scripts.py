"""The Lua scripts of the ledger: read from `lua/`, completed, and ready to be sent.

Each file in `lua/jobs`, `workers`, `backlog`, `repair` and `epoch` is one operation and begins with a header (does,
KEYS, ARGV, replies, cost, repeat). The loader puts the functions of `lua/lib` that the operation uses in front of it.
Unused functions and comments are left out, because the server spends time on them at every call.

The loader replaces KEY (`routing.ledger.keys`), STEP (`routing.model.states`) and LIMIT (`routing.policy.placement` and
the settings) by their values, so that every name and number has one place. It replaces ARG, EACH and INNER by the
places of the arguments (`routing.ledger.signatures`).
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
from celery_capacity.routing.policy.placement import CANDIDATES, FREED_PASSES, MAX_ADMITTED, SHAPES
from celery_capacity.routing.policy.unknown_starts import FEWEST_LOSSES

#: Candidates that a submit fetches first. It fetches the others only where none of these has room.
FEW: Final = 4

#: The most jobs of one shape whose changes a submit keeps until it writes them together. Lua can give a command no
#: more than 8,000 arguments.
MAX_BATCH: Final = 1000

#: Workers that one script looks at for many jobs together, in some 2 ms. Later jobs are placed by separate scripts.
SEARCHED: Final = 8 * CANDIDATES
#: Passes of one script over all workers that are no longer kept because of it.
MAX_FREED_PASSES: Final = 2 * FREED_PASSES

#: Jobs of a worker whose amounts one script adds up, in some 2 ms. More jobs are counted in pages.
HELD: Final = 500

#: Milliseconds for which a catalogue of tasks outlives the last heartbeat of its workers: a day.
CATALOGUE_MS: Final = 86_400_000

#: The most bytes of a message that a release may hand over to the worker that asks. Larger ones go by the broker.
HAND_OVER_BYTES: Final = 65_536

#: The folders of the operations.
FOLDERS: Final = ("jobs", "workers", "backlog", "repair", "epoch")
#: The files of `lua/lib`, with the functions that the operations share. A function stands behind those that it uses.
LIBRARY: Final = (
    "values", "book", "indexes", "search", "transitions", "queues", "admit", "requeue", "batches", "admit_or_file",
    "held", "exclusive", "shapes_to_try", "fill_pass", "fill",
)  # fmt: skip
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
_VALUE: Final = re.compile(r"\b(KEY|STEP|LIMIT|ARG|EACH|INNER)\.(\w+)\b")
_COMMENT: Final = re.compile(r"^\s*--[^\n]*\n", re.MULTILINE)


def _functions() -> dict[str, str]:
    """Return the functions of the library by name, in their order."""
    return {match.group(1): match.group(0) for match in _FUNCTION.finditer(library())}


def _used(body: str, functions: dict[str, str]) -> list[str]:
    """Return the names of the functions that a body uses, directly or not, in the order of the library."""
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
    """Return all scripts, by name.

    `start_ms`: milliseconds after which an unclaimed message is delivered again. `tombstone_ms`: milliseconds for which
    an ended job is remembered after Postgres has its end. `flags`: True if the server reads the line
    `#!lua flags=...`. Redis 7 and Valkey do. Redis 6.2 takes it for an error, and gets `BEFORE_FLAGS` instead.
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
            "passes": FREED_PASSES,
            "freed": MAX_FREED_PASSES,
            "searched": SEARCHED,
            "held": HELD,
            "catalogue": CATALOGUE_MS,
            "tombstone": tombstone_ms,
            "submit_limit": tombstone_ms // 2,
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
        content = source(name)
        first = FLAGS.match(content)
        body = FLAGS.sub("", content)
        text = "".join(functions[used] for used in _used(body, functions)) + body
        values_by_kind = values | signature(name).positions()
        text = _VALUE.sub(partial(_value, values_by_kind), _COMMENT.sub("", text))
        if first:
            text = (first.group(0) if flags else BEFORE_FLAGS) + text
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        scripts[name] = Script(name, text, sha, signature(name))
    return scripts


def _value(values: Mapping[str, Mapping[str, Any]], match: re.Match[str]) -> str:
    return str(values[match.group(1)][match.group(2)])
