"""Body of a task message as bytes, and Celery's two forms of a message.

The body is written in the serialiser and the compression that its sender asks for. A row always has protocol 2, so that
no code behind it knows another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from celery.utils.saferepr import saferepr
from kombu import compression as compressors
from kombu import serialization
from kombu.exceptions import EncodeError, SerializerNotInstalled

from celery_capacity.routing.config.redaction import hidden
from celery_capacity.routing.errors import InvalidRequest, MessageTooDeep, Unsupported, mask_url, show
from celery_capacity.routing.model.nesting import JSON, check_value

#: Characters and levels of arguments that are shown, as Celery has them.
SHOWN_SIZE: Final = 1024
SHOWN_LEVELS: Final = 3
#: Fields that protocol 1 has in the body and protocol 2 in the headers -> their new name, None where it is equal.
MOVED: Final = {"taskset": "group", **dict.fromkeys((
    "task", "id", "group", "group_index", "eta", "expires", "retries", "timelimit", "root_id", "parent_id", "shadow",
    "origin", "ignore_result",
))}  # fmt: skip


class NotEncodable(InvalidRequest, EncodeError):
    """Arguments that the serialiser cannot write. It is also the `EncodeError` that kombu raises there."""


def encode(
    body: Any, headers: Mapping[str, Any], serializer: str | None, compression: str | None
) -> tuple[bytes, str, str, dict[str, Any]]:
    """Encode a body, and return (body, content type, content encoding, headers).

    Raises `InvalidRequest`, `MessageTooDeep`.
    """
    try:
        content_type, content_encoding, payload = serialization.dumps(body, serializer=serializer or "json")
    except (SerializerNotInstalled, TypeError) as error:
        raise InvalidRequest(f"serializer {show(serializer)} is not known", advice="Leave it out.") from error
    except EncodeError as error:
        if isinstance(error.__cause__ or error.args[0], RecursionError):
            raise MessageTooDeep(f"the arguments of {headers.get('task')} are nested too deep") from error
        raise NotEncodable(
            f"the arguments of {headers.get('task')} cannot be written as {serializer or 'json'}: {error}",
            value=headers.get("argsrepr"),
            advice="Pass text, numbers, lists and dicts, or a reference (a path, a key) to the data.",
        ) from error
    raw = payload.encode(content_encoding) if isinstance(payload, str) else bytes(payload)
    wire = dict(headers)
    if compression or content_type != JSON:
        check_value(body, headers.get("task"))
    if compression:
        try:
            raw, wire["compression"] = compressors.compress(raw, compression)
        except (KeyError, TypeError) as error:
            raise InvalidRequest(
                f"compression {show(compression)} is not known", advice="Pass 'gzip', or leave it out."
            ) from error
    return raw, content_type, content_encoding, wire


def shown(arguments: Any, most: int = SHOWN_SIZE, levels: int = SHOWN_LEVELS) -> str:
    """Return arguments as logs, events and pages show them, without values that look secret."""
    text: str = saferepr(hidden(arguments), most, maxlevels=levels)
    return mask_url(text) if "://" in text else text


def to_protocol2(body: Mapping[str, Any], headers: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Convert a message of protocol 1, and return (body, headers) of protocol 2.

    Headers that the message has already are kept. Raises `InvalidRequest`, `Unsupported`.
    """
    args, kwargs = body.get("args") or (), body.get("kwargs") or {}
    if "task" not in body or "id" not in body:
        raise InvalidRequest("not a task message (protocol 1 or 2)", value=sorted(map(str, body))[:10])
    if not isinstance(args, (list, tuple)) or not isinstance(kwargs, Mapping):
        raise InvalidRequest(
            f"the arguments of {show(body['task'])} are not valid",
            advice="`args` must be a list, and `kwargs` an object.",
        )
    if body.get("chain"):
        raise Unsupported("a chain in a message of protocol 1", advice="Leave task_protocol at 2.")
    moved = {name or old: body[old] for old, name in MOVED.items() if body.get(old) is not None}
    for what in ("eta", "expires"):
        if what in moved and body.get("utc", True):
            moved[what] = _in_utc(moved[what])
    embed = {"callbacks": body.get("callbacks"), "errbacks": body.get("errbacks"), "chord": body.get("chord")}
    made = {"lang": "py", "argsrepr": shown(args), "kwargsrepr": shown(kwargs), **moved, **headers}
    return (list(args), dict(kwargs), {**embed, "chain": None}), made


def _in_utc(value: Any) -> Any:
    """Return a time with the zone UTC if it names none. The message says that such times are in UTC."""
    if not isinstance(value, str):
        return value
    try:
        when = datetime.fromisoformat(value)
    except ValueError:
        return value  # the sender says what is wrong with it
    return when.replace(tzinfo=UTC).isoformat() if when.tzinfo is None else value
