"""Envelopes from a queue, read with suspicion: anybody who can write to Redis can put anything there.

An envelope is the JSON object that kombu's virtual transports send (see `routing.model.message`). `read` accepts an
envelope of which kombu can make a message. For everything else it raises `Unreadable` with the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from celery_capacity.routing.model.reasons import Refusal

#: Levels of lists and objects in an envelope. The body is text here, whatever is in it.
MAX_LEVELS: Final = 100
#: Characters of a delivery tag, an exchange and a routing key.
NAME_LENGTH: Final = 512
#: Encodings in which the bodies of messages are written into JSON.
ENCODINGS: Final = ("base64", "utf-8", None)

#: Text before and behind the delivery tag at the end of a message that a script delivers: see `tagged` in
#: lua/lib/transitions.lua.
_TAG: Final = b',"delivery_tag":'
_END: Final = b"}}"


class Unreadable(ValueError):
    """The bytes are no task message; the error's text says why. `reason`: by which such messages are counted."""

    def __init__(self, text: str, reason: Refusal = Refusal.NO_MESSAGE) -> None:
        super().__init__(text)
        self.reason = reason

    @classmethod
    def of(cls, error: Exception) -> Unreadable:
        """Return an error of kombu or of this module as an `Unreadable`."""
        if isinstance(error, Unreadable):
            return error
        return cls(f"no message can be made of it: {error!r}", Refusal.UNDECODABLE)


class Envelope(dict[str, Any]):
    """An envelope and the bytes that it was read from."""

    raw: bytes = b""

    @property
    def tag(self) -> str:
        tag: str = self["properties"]["delivery_tag"]
        return tag


def read(raw: bytes) -> Envelope:
    """Return the envelope in these bytes. Raises `Unreadable`."""
    try:
        decoded = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Unreadable(f"not UTF-8 (at byte {error.start})", Refusal.NOT_JSON) from error
    except RecursionError as error:
        raise Unreadable("nested too deep", Refusal.NESTED) from error
    except ValueError as error:
        raise Unreadable(f"not JSON: {error}", Refusal.NOT_JSON) from error
    envelope = checked(decoded)
    # Count first: most messages have fewer brackets in all than levels are allowed.
    if raw.count(b"[") + raw.count(b"{") > MAX_LEVELS and not _is_shallow(decoded):
        raise Unreadable("nested too deep", Refusal.NESTED)
    envelope.raw = raw
    return envelope


def checked(decoded: object) -> Envelope:
    """Return a decoded envelope if a message can be made of it. Raises `Unreadable`."""
    if not isinstance(decoded, dict):
        raise Unreadable(f"JSON, but no message: {_kind(decoded)}")
    properties = decoded.get("properties")
    if not isinstance(properties, dict):
        raise Unreadable("no properties")
    tag = properties.get("delivery_tag")
    if not tag or not _is_name(tag):
        raise Unreadable("no delivery tag")
    delivery = properties.get("delivery_info")
    if not isinstance(delivery, dict) or not all(_is_name(delivery.get(name)) for name in ("exchange", "routing_key")):
        raise Unreadable("no delivery information")
    if not isinstance(decoded.get("headers"), dict | None):
        raise Unreadable("headers that are no object")
    for name in ("content-type", "content-encoding"):
        if not isinstance(decoded.get(name), str | None):
            raise Unreadable(f"a {name} that is no text")
    if not isinstance(decoded.get("body"), str):
        raise Unreadable(f"a body that is no text: {_kind(decoded.get('body'))}")
    if properties.get("body_encoding") not in ENCODINGS:
        raise Unreadable("a body in an unknown encoding")
    return Envelope(decoded)


def _is_name(value: object) -> bool:
    """Return True if a value can stand in a key.

    Printable text has no half of a surrogate pair, which UTF-8 cannot hold.
    """
    return isinstance(value, str) and len(value) <= NAME_LENGTH and value.isprintable()


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null", dict: "an object"}
    return names.get(type(value), "a number")


def _is_shallow(value: object) -> bool:
    """Return True if no part of a value is nested too deep for code that walks through it."""
    level = [value]
    for _ in range(MAX_LEVELS):
        inside: list[object] = []
        for member in level:
            if isinstance(member, Mapping):
                inside += member.values()
            elif isinstance(member, list):
                inside += member
        if not inside:
            return True
        level = inside
    return False


def digest_of(message: bytes) -> str:
    """Return the digest that the ledger keeps beside a message, to recognize the message when it arrives.

    SHA-1 is enough: only the sender chooses a message, and its digest with it.
    """
    return hashlib.sha1(message, usedforsecurity=False).hexdigest()


def digest(envelope: Envelope) -> str:
    """Return the digest of a received message without its delivery tag.

    A forged message gives a digest that the ledger does not know.
    """
    raw, tag = envelope.raw, envelope.tag
    # Most tags are written as they are, so that nothing need be decoded.
    end = b'%s"%s"%s' % (_TAG, tag.encode(), _END)
    if '"' not in tag and "\\" not in tag and raw.endswith(end):
        return digest_of(raw[: -len(end)] + _END)
    at, tag_there = _tag_at_end(raw)
    return digest_of(raw[:at] + _END if tag_there == tag else b"")


def tag_at_end(raw: bytes) -> str:
    """Return the tag that a script put at the end of a message, whatever else is in it; '' where there is none."""
    return _tag_at_end(raw)[1]


def _tag_at_end(raw: bytes) -> tuple[int, str]:
    at = raw.rfind(_TAG)
    if at < 0 or not raw.endswith(_END):
        return -1, ""
    try:
        # Only the tag may stand there: a later key in JSON would override an earlier one.
        tag = json.loads(raw[at + len(_TAG) : -len(_END)])
    except (ValueError, RecursionError):
        return -1, ""
    return (at, tag) if isinstance(tag, str) else (-1, "")
