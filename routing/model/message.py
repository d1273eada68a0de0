"""The message of a job as its row keeps it: JSON text from which any broker's message can be made again.

The form is that of kombu's virtual transports, so that on Redis a script can push it as it is::

    {"body": <base64>, "content-encoding": ..., "content-type": ..., "headers": {...}, "properties": {...}}

`properties` comes last and is never empty, so the text ends with `}}`. The script that delivers the message puts the
delivery tag there, which is the token of the attempt. The tag is `<job>:<epoch>.<attempt>`. Where the attempt holds one
of several alternatives, the number of that one stands behind it: `<job>:<epoch>.<attempt>/<number>`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from uuid import uuid4

from celery_capacity.routing.errors import InvalidRequest, MessageTooDeep, MessageTooLarge
from celery_capacity.routing.model.nesting import check_headers
from celery_capacity.routing.model.token import Token

#: Header that carries the request: {"shape": ..., "declared": ...}.
HEADER: Final = "capacity_request"
#: Key in that header: the time that the job was put off to. Its task sees the time as `self.request.eta`.
ETA: Final = "eta"
#: Header, where traces are on: the time at which the message was made, in milliseconds of its sender's clock.
ACCEPTED: Final = "capacity_accepted_ms"
#: Header that names the sender.
SENDER: Final = "origin"
#: Prefix of the names of the platform's own messages (ticks), which make no job.
PLATFORM_PREFIX: Final = "platform."
#: Most characters of a token: two numbers of 64 bits.
TOKEN_LENGTH: Final = 40
#: Number of an alternative in a tag.
_NUMBER: Final = re.compile(r"[1-9]", re.ASCII)
#: Fields that a template leaves open beside the id and the body, and the part of the message that has each.
OPEN: Final = {
    "argsrepr": "headers",
    "kwargsrepr": "headers",
    SENDER: "headers",
    "reply_to": "properties",
}
#: JSON encoder without blanks. `json.dumps` would make one at each call.
_compact: Final = json.JSONEncoder(separators=(",", ":")).encode
#: Encoder of a text alone.
_quoted: Final = json.encoder.encode_basestring_ascii


class Tag(NamedTuple):
    """Delivery tag: a job, and the token of its attempt. `alternative`: the number of the one that it holds, or 0."""

    job: str
    token: Token
    alternative: int = 0

    def __str__(self) -> str:
        return f"{self.job}:{self.token}" + (f"/{self.alternative}" if self.alternative else "")


def parse_tag(text: object) -> Tag | None:
    """Return the tag that a script wrote, or None for any other value."""
    if not isinstance(text, str):
        return None
    job, _, attempt = text.rpartition(":")
    token, slash, number = attempt.partition("/")
    if not job or len(token) > TOKEN_LENGTH or (slash and not _NUMBER.fullmatch(number)):
        return None
    try:
        return Tag(job, Token.parse(token), int(number or 0))
    except ValueError:
        return None


def tagged(message: bytes, tag: Tag) -> str:
    """Return a row's message with its delivery tag, in the form of `tagged` in lua/lib/transitions.lua."""
    return f'{message[:-2].decode("utf-8")},"delivery_tag":{json.dumps(str(tag))}}}}}'


def encode(
    body: bytes,
    *,
    content_type: str,
    content_encoding: str,
    headers: Mapping[str, Any],
    properties: Mapping[str, Any],
    limit: int,
) -> bytes:
    """Return the text of a message.

    Raises `InvalidRequest` where the headers are not JSON, `MessageTooLarge` where the text has more than `limit`
    bytes, and `MessageTooDeep`.
    """
    envelope = {
        "body": _text_of(body),
        "content-encoding": content_encoding,
        "content-type": content_type,
        "headers": dict(headers),
        "properties": {**properties, "body_encoding": "base64"},
    }
    try:
        text = _compact(envelope).encode("ascii")
    except RecursionError as error:
        raise MessageTooDeep("the message's headers are nested too deep") from error
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            f"the message's headers cannot be written as JSON: {error}",
            advice="Pass headers and stamps that are text, numbers, lists or dicts.",
        ) from error
    _check_size(text, body, limit)
    check_headers(text)
    return text


def _text_of(body: bytes) -> str:
    return base64.b64encode(body).decode("ascii")


def _check_size(message: bytes, body: bytes, limit: int) -> None:
    # Count the bytes of the body itself: in base64 three bytes are four characters.
    size = len(message) - (len(body) + 2) // 3 * 4 + len(body)
    if size > limit:
        raise MessageTooLarge(f"the message has {size} bytes, {limit} are allowed", value=size)


@dataclass(frozen=True, slots=True)
class Template:
    """Text of messages that differ only in their body, in their fields `OPEN` and in their id. Each is its own root.

    `form`: the text, with a place such as `%(body)s` for each of these.
    """

    form: str

    @classmethod
    def of(cls, message: bytes) -> Template:
        """Return the template of a message that `encode` could make."""
        envelope, mark = decode(message), uuid4().hex
        headers, properties = envelope["headers"], envelope["properties"]
        envelope["body"] = f"{mark}body"
        for part, name in OPEN.items():
            envelope[name][part] = mark + part
        headers["id"] = headers["root_id"] = properties["correlation_id"] = f"{mark}id"
        text = _compact(envelope).replace("%", "%%")
        return cls(re.sub(f'"{mark}([a-z_]+)"', r"%(\1)s", text))

    def fill(self, job: str, body: bytes, limit: int, **opened: str) -> bytes:
        """Return the message of another job. `opened`: a value for each of `OPEN`. Raises `MessageTooLarge`."""
        values = {name: _quoted(value) for name, value in opened.items()}
        values["id"], values["body"] = _quoted(job), f'"{_text_of(body)}"'
        text = (self.form % values).encode("ascii")
        _check_size(text, body, limit)
        return text


def decode(message: bytes) -> dict[str, Any]:
    """Return the envelope of a stored message."""
    envelope = json.loads(message)
    if not isinstance(envelope, dict):
        raise ValueError("a stored message is not an object")
    return envelope


def body_of(envelope: Mapping[str, Any]) -> bytes:
    """Return the body of an envelope as its sender encoded it."""
    body: str = envelope["body"]
    return base64.b64decode(body) if envelope["properties"].get("body_encoding") == "base64" else body.encode()
