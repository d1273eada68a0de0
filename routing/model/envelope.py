"""What came from a queue, read with suspicion: anybody who can write to Redis can put anything there.

An envelope is the JSON object that kombu's virtual transports send (see `routing.model.message`). `read` accepts one
that kombu can make a message of, and raises `Unreadable` with the reason for everything else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

#: Levels of lists and objects in an envelope. (A body is text here, whatever is in it.)
MOST_LEVELS: Final = 100
#: Characters of a delivery tag, an exchange and a routing key.
NAME_LENGTH: Final = 512
#: How the bodies of messages are written into JSON.
ENCODINGS: Final = ("base64", "utf-8", None)

#: What the scripts put at the end of a message: see `tagged` in lua/lib/transitions.lua.
_TAG: Final = b',"delivery_tag":'
_END: Final = b"}}"


class Unreadable(ValueError):
    """This is no task message; the text says why."""


class Envelope(dict[str, Any]):
    """An envelope and the bytes that it was read from."""

    raw: bytes = b""

    @property
    def tag(self) -> str:
        found: str = self["properties"]["delivery_tag"]
        return found


def read(raw: bytes) -> Envelope:
    """The envelope in these bytes. Raises `Unreadable`."""
    try:
        found = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 (at byte {error.start})") from error
    except RecursionError as error:
        raise Unreadable("nested too deep") from error
    except ValueError as error:
        raise Unreadable(f"not JSON: {error}") from error
    envelope = checked(found)
    # (Most messages have fewer brackets in all.)
    if raw.count(b"[") + raw.count(b"{") > MOST_LEVELS and not _is_shallow(found):
        raise Unreadable("nested too deep")
    envelope.raw = raw
    return envelope


def checked(found: object) -> Envelope:
    """A decoded envelope, if a message can be made of it. Raises `Unreadable`."""
    if not isinstance(found, dict):
        raise Unreadable(f"JSON, but no message: {_kind(found)}")
    properties = found.get("properties")
    if not isinstance(properties, dict):
        raise Unreadable("no properties")
    tag = properties.get("delivery_tag")
    if not tag or not _is_name(tag):
        raise Unreadable("no delivery tag")
    delivery = properties.get("delivery_info")
    if not isinstance(delivery, dict) or not all(_is_name(delivery.get(name)) for name in ("exchange", "routing_key")):
        raise Unreadable("no delivery information")
    if not isinstance(found.get("headers"), dict | None):
        raise Unreadable("headers that are no object")
    for name in ("content-type", "content-encoding"):
        if not isinstance(found.get(name), str | None):
            raise Unreadable(f"a {name} that is no text")
    if not isinstance(found.get("body"), str):
        raise Unreadable(f"a body that is no text: {_kind(found.get('body'))}")
    if properties.get("body_encoding") not in ENCODINGS:
        raise Unreadable("a body in an unknown encoding")
    return Envelope(found)


def _is_name(value: object) -> bool:
    """Whether it can stand in a key. (Printable is no half of a surrogate pair, which no UTF-8 has.)"""
    return isinstance(value, str) and len(value) <= NAME_LENGTH and value.isprintable()


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null", dict: "an object"}
    return names.get(type(value), "a number")


def _is_shallow(value: object) -> bool:
    """Whether nothing in it is nested too deep for those who walk through it."""
    here = [value]
    for _ in range(MOST_LEVELS):
        inside: list[object] = []
        for one in here:
            if isinstance(one, Mapping):
                inside += one.values()
            elif isinstance(one, list):
                inside += one
        if not inside:
            return True
        here = inside
    return False


def digest_of(message: bytes) -> str:
    """What the ledger keeps beside a message, to tell whether what arrives is that. (SHA-1, since nobody but the sender
    chooses a message, and its digest with it.)"""
    return hashlib.sha1(message, usedforsecurity=False).hexdigest()


def digest(envelope: Envelope) -> str:
    """The same of what came, without the tag that the script put there. Of what no script made it is a digest that the
    ledger has not."""
    raw = envelope.raw
    at, tag = _tag_at_end(raw)
    return digest_of(raw[:at] + _END if tag == envelope.tag else b"")


def tag_at_end(raw: bytes) -> str:
    """The tag that a script put at the end of a message, whatever else is in it; '' where there is none."""
    return _tag_at_end(raw)[1]


def _tag_at_end(raw: bytes) -> tuple[int, str]:
    at = raw.rfind(_TAG)
    if at < 0 or not raw.endswith(_END):
        return -1, ""
    try:
        # Nothing but the tag may stand there: what follows it in JSON would override what stands before.
        tag = json.loads(raw[at + len(_TAG) : -len(_END)])
    except (ValueError, RecursionError):
        return -1, ""
    return (at, tag) if isinstance(tag, str) else (-1, "")
