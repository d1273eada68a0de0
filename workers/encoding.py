"""The body of a task message as bytes, in the serialiser and the compression that its sender asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kombu import compression as compressors
from kombu import serialization
from kombu.exceptions import EncodeError, SerializerNotInstalled

from celery_capacity.routing.errors import InvalidRequest, MessageTooDeep, show
from celery_capacity.routing.model.nesting import JSON, check_value


class NotEncodable(InvalidRequest, EncodeError):
    """Arguments that the serialiser cannot write: for who catches what kombu raises there."""


def encode(
    body: Any, headers: Mapping[str, Any], serializer: str | None, compression: str | None
) -> tuple[bytes, str, str, dict[str, Any]]:
    """(body, content type, content encoding, headers). Raises `InvalidRequest`, `MessageTooDeep`."""
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
