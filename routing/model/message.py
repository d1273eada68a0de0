"""The message of a job as its row keeps it: JSON text that any broker's message can be made of again.

The form is that of kombu's virtual transports, so that on Redis a script can push it as it is::

    {"body": <base64>, "content-encoding": ..., "content-type": ..., "headers": {...}, "properties": {...}}

`properties` comes last and never is empty: the text ends with `}}`, and the script that delivers it puts the delivery
tag there, which is the token of the attempt. The tag is `<job>:<epoch>.<attempt>`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

from celery_capacity.routing.errors import InvalidRequest, MessageTooDeep, MessageTooLarge
from celery_capacity.routing.model.nesting import check_headers

#: The header that carries the request: {"shape": ..., "declared": ...}.
HEADER: Final = "capacity_request"
#: In it: the time that the job was put off to, which its task sees as `self.request.eta`.
ETA: Final = "eta"
#: The names of the platform's own messages (ticks): they make no job.
PLATFORM_PREFIX: Final = "platform."
#: Characters of a token at the most: two numbers of 64 bits. (A longer one was written by nobody of ours.)
TOKEN_LENGTH: Final = 40
#: What a template leaves open beside the id and the body, and where it stands.
OPEN: Final = {
    "argsrepr": "headers",
    "kwargsrepr": "headers",
    "origin": "headers",
    "reply_to": "properties",
}
#: As `json.dumps` with these separators, which makes an encoder at each call.
_compact: Final = json.JSONEncoder(separators=(",", ":")).encode
#: What it makes of a text.
_quoted: Final = json.encoder.encode_basestring_ascii


@dataclass(frozen=True, slots=True)
class Tag:
    """The delivery tag: which job, and which attempt of it."""

    job: str
    epoch: int
    attempt: int

    @property
    def token(self) -> str:
        return f"{self.epoch}.{self.attempt}"


def parse_tag(text: object) -> Tag | None:
    """The tag that a script wrote, or None where it is none."""
    if not isinstance(text, str):
        return None
    job, _, token = text.rpartition(":")
    epoch, _, attempt = token.partition(".")
    if not job or not (epoch.isascii() and epoch.isdigit() and attempt.isascii() and attempt.isdigit()):
        return None
    if len(token) > TOKEN_LENGTH:
        return None
    return Tag(job, int(epoch), int(attempt))


def encode(
    body: bytes,
    *,
    content_type: str,
    content_encoding: str,
    headers: Mapping[str, Any],
    properties: Mapping[str, Any],
    limit: int,
) -> bytes:
    """The text of a message. Raises `InvalidRequest` where its headers are not JSON, `MessageTooLarge` where it has
    more than `limit` bytes, `MessageTooDeep`."""
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
    # The body as it is, not as base64 makes it: four characters for three bytes.
    size = len(message) - (len(body) + 2) // 3 * 4 + len(body)
    if size > limit:
        raise MessageTooLarge(f"the message has {size} bytes, {limit} are allowed", value=size)


@dataclass(frozen=True, slots=True)
class Template:
    """Messages that differ by their body, by `OPEN` and by their id alone, which is that of their root too. `form`:
    the text, with a place in Python's form (`%(name)s`) for each of these."""

    form: str

    @classmethod
    def of(cls, message: bytes) -> Template:
        """The template of a message such as `encode` makes."""
        envelope, mark = decode(message), uuid4().hex
        headers, properties = envelope["headers"], envelope["properties"]
        envelope["body"] = f"{mark}body"
        for part, name in OPEN.items():
            envelope[name][part] = mark + part
        headers["id"] = headers["root_id"] = properties["correlation_id"] = f"{mark}id"
        text = _compact(envelope).replace("%", "%%")
        return cls(re.sub(f'"{mark}([a-z_]+)"', r"%(\1)s", text))

    def fill(self, job: str, body: bytes, limit: int, **opened: str) -> bytes:
        """The message of another job. `opened`: a value for each of `OPEN`. Raises `MessageTooLarge` as `encode`."""
        values = {name: _quoted(value) for name, value in opened.items()}
        values["id"], values["body"] = _quoted(job), f'"{_text_of(body)}"'
        text = (self.form % values).encode("ascii")
        _check_size(text, body, limit)
        return text


def decode(message: bytes) -> dict[str, Any]:
    """The envelope of a stored message."""
    envelope = json.loads(message)
    if not isinstance(envelope, dict):
        raise ValueError("a stored message is not an object")
    return envelope


def body_of(envelope: Mapping[str, Any]) -> bytes:
    """The body of an envelope as its sender encoded it."""
    body: str = envelope["body"]
    return base64.b64decode(body) if envelope["properties"].get("body_encoding") == "base64" else body.encode()
