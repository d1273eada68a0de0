"""Message → job: the body of a call as bytes, checked, with its headers and properties, in one `NewJob`.

The body is written in the serialiser and the compression that its sender asks for. A row always has protocol 2, so that
no code behind it knows another one. Nothing here writes a row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, tzinfo
from typing import Any, Final, NamedTuple

from celery.utils.saferepr import saferepr
from kombu import compression as compressors
from kombu import serialization
from kombu.exceptions import EncodeError, SerializerNotInstalled
from kombu.utils import json as kombu_json

from celery_capacity.routing import format_versions
from celery_capacity.routing.config.redaction import hidden
from celery_capacity.routing.config.task_rules import RERUN
from celery_capacity.routing.errors import InvalidRequest, MessageTooDeep, Unsupported, mask_url, show
from celery_capacity.routing.insert import key_options
from celery_capacity.routing.model import message as messages
from celery_capacity.routing.model.amounts import DEFAULT_QUEUE, LABEL
from celery_capacity.routing.model.expected import (
    EXPECTED_MS,
    LIMITS,
    LONGEST_MS,
    NO_LIMITS,
    Limits,
    RunTime,
    within_limits,
)
from celery_capacity.routing.model.identifiers import check_job_id, check_queue_name, check_tenant
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.message import ACCEPTED, ETA, HEADER
from celery_capacity.routing.model.nesting import JSON, check_body, check_value
from celery_capacity.routing.model.request import TENANT, Request, alternatives_term, check_alternatives, timed
from celery_capacity.routing.policy.labels import place_of
from celery_capacity.routing.policy.tenants import DEFAULT_TENANT, tenant_term
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit.canvas import REPLACES
from celery_capacity.workers.submit.constraints import Rates
from celery_capacity.workers.submit.validation import (
    check_name,
    check_parent,
    check_priority,
    check_time_limits,
    check_times,
    check_zoned,
    stamps_of,
    to_limits,
)

#: Header in which Celery carries on the value that a task saw as `self.request.attempt`.
ATTEMPT_HEADER: Final = "attempt"
#: Header by which a retry says that its task gave it a priority. No message has it.
PRIORITY_HEADER: Final = "platform_priority_given"
#: Characters and levels of arguments that are shown, as Celery has them.
SHOWN_SIZE: Final = 1024
SHOWN_LEVELS: Final = 3
#: Fields that protocol 1 has in the body and protocol 2 in the headers -> their new name, None where it is equal.
MOVED: Final = {"taskset": "group", **dict.fromkeys((
    "task", "id", "group", "group_index", "eta", "expires", "retries", "timelimit", "root_id", "parent_id", "shadow",
    "origin", "ignore_result",
))}  # fmt: skip

#: Properties that the platform writes itself, and options of a publish that are no properties. RabbitMQ has the headers
#: and the type of the body among the properties: the message has both already, the headers without secrets.
_NOT_CARRIED: Final = frozenset(
    {
        *("correlation_id", "reply_to", "delivery_mode", "delivery_info", "delivery_tag", "priority", "body_encoding"),
        *("immediate", "mandatory"),
        *("application_headers", "content_type", "content_encoding", "cluster_id"),
    }
)


class RawMessage(NamedTuple):
    """Message of protocol 2 with its body in bytes. `queue`: the name of its queue."""

    body: bytes
    content_type: str
    content_encoding: str
    headers: Mapping[str, Any]
    queue: str
    properties: Mapping[str, Any]


class Encoder:
    """Encoder of an app's messages as jobs.

    `rates`: the rates of tasks. `zone`: the zone of times that name none. `accepted`: the content types that workers
    read. `may_ask` returns True if this thread may wait for Postgres.
    """

    def __init__(
        self,
        stores: Stores,
        rates: Rates,
        may_ask: Callable[[], bool],
        default_queue: str,
        zone: tzinfo = UTC,
        accepted: Collection[str] = (JSON,),
    ) -> None:
        self._stores = stores
        self._rates = rates
        self._may_ask = may_ask
        self._default_queue = default_queue
        self._zone = zone
        self._accepted = accepted

    def encode(
        self,
        body: Any,
        *,
        headers: Mapping[str, Any],
        serializer: str | None,
        compression: str | None,
        routing_key: str | None,
        properties: Mapping[str, Any],
    ) -> NewJob:
        """Return the job of a message as Celery publishes it, of either protocol.

        Raises `InvalidRequest`, `Unsupported`, `MessageTooDeep`, `MessageTooLarge`.
        """
        if isinstance(body, Mapping):
            body, headers = to_protocol2(body, headers)
        raw, content_type, content_encoding, wire = encode_body(body, headers, serializer, compression)
        queue = routing_key or self._default_queue
        return self.job_of(RawMessage(raw, content_type, content_encoding, wire, queue, properties))

    def job_of(self, message: RawMessage) -> NewJob:
        """Return the job of a message that is encoded already. Raises as `encode` does."""
        content_type, headers = message.content_type, message.headers
        if content_type not in self._accepted:
            # No worker of this configuration would read it.
            serializer = serialization.registry.type_to_name.get(content_type, content_type)
            raise InvalidRequest(
                f"serializer {show(serializer)} is not accepted here",
                value=serializer,
                advice="Leave it out, or name it in accept_content.",
            )
        if content_type == JSON and not headers.get("compression"):
            check_body(message.body, headers.get("task"))
        wire = dict(headers)
        request, terms = self._request(wire, message.queue)
        limited = key_options.of_wire(wire, HEADER)
        constraints = self._rates.constraints(wire, HEADER, self._may_ask)
        check_time_limits(wire.get("timelimit"))
        run_time = run_time_of(wire, self.learned_of(wire.get("task"), request.shape, self._may_ask))
        shape = wire[HEADER]["shape"] = timed(request.shape + terms + _term_of(wire[HEADER]), run_time)
        due_at, expires_at = (check_zoned(wire.get(what), what, self._zone) for what in ("eta", "expires"))
        self._note_times(wire)
        priority = check_priority(message.properties.get("priority"))
        # The attempt that publishes a retry or a replacement.
        publisher = wire.pop(ATTEMPT_HEADER, None)
        priority_given = bool(wire.pop(PRIORITY_HEADER, False))
        return NewJob(
            id=check_job_id(wire.get("id")),
            name=check_name(wire.get("task")),
            shape=shape,
            message=messages.encode(
                message.body,
                content_type=content_type,
                content_encoding=message.content_encoding,
                headers=wire,
                properties=_wire_properties(message.properties, message.queue, priority, expires=bool(expires_at)),
                limit=self._stores.settings.max_message,
            ),
            priority=priority,
            declared=bool(wire[HEADER].get("declared")),
            rerun=wire[HEADER].get(RERUN) is not False,
            queue=message.queue,
            retries=check_times(wire.get("retries"), "retries"),
            nesting=check_times(wire.get("replaced_task_nesting"), "replaced_task_nesting"),
            publisher=publisher if isinstance(publisher, int) else None,
            root_id=check_parent(wire.get("root_id")),
            parent_id=check_parent(wire.get("parent_id")),
            replaces=check_parent(wire.get(REPLACES)),
            due_at=due_at,
            expires_at=expires_at,
            constraints=constraints,
            stamps=stamps_of(wire) if wire.get("stamped_headers") else None,
            expected_ms=run_time.expected,
            key_limits=limited,
            priority_given=priority_given,
        )

    def _note_times(self, wire: dict[str, Any]) -> None:
        """Write into the headers since when the job waits. The broker's message is a doorbell, and has no ETA.

        The row alone keeps the time that the job is put off to. The platform's header tells it to the task.
        """
        wire[HEADER].pop(ETA, None)
        eta, wire["eta"] = wire.get("eta"), None
        if eta:
            wire[HEADER][ETA] = str(eta)
        if self._stores.settings.traces:
            wire[ACCEPTED] = round(time.time() * 1000)

    def _request(self, wire: dict[str, Any], queue: str) -> tuple[Request, str]:
        """Return the first alternative of a job, and the terms of its alternatives and its place.

        Its request is written into the platform's header.
        """
        carried = wire.get(HEADER)
        if not isinstance(carried, Mapping):
            # An old producer, or a publish that passed no router.
            carried = {
                "shape": Request.from_options({}, self._stores.settings.default_cpus).shape,
                "declared": False,
            }
        carried = wire[HEADER] = {**carried, "format": format_versions.MESSAGE}
        shape = str(carried.get("shape"))
        requests = check_alternatives(shape)
        if queue != DEFAULT_QUEUE or LABEL in requests[0].shape:
            if len(requests) > 1 and set(queue) & set("!;|"):
                # These characters separate the alternatives in a shape.
                advice = "Choose a queue without ! ; and | in its name, or leave out `requests`."
                raise InvalidRequest(f"queue {show(queue)} takes no alternatives", value=queue, advice=advice)
            requests = tuple(request.within(check_queue_name(queue)) for request in requests)
            wire[HEADER] = {**carried, "shape": requests[0].shape}
        return requests[0], alternatives_term(requests) + place_of(shape).terms

    def learned_of(self, task: object, request: str, may_ask: Callable[[], bool] | None = None) -> int:
        """Return the learned run time of a task with this request in milliseconds, 0 where it is unknown.

        `may_ask`: where it returns True, the times are read anew when it is time.
        """
        if not self._stores.settings.learn_run_times:
            return 0
        if may_ask is not None:
            self._stores.learned.refresh(may_ask)
        return self._stores.learned.of(task, request)

    def job_like(self, first: NewJob, job: str, message: bytes, *, may_ask: bool = True) -> NewJob:
        """Return the job `job` with a message of its own, and with all else as the ordinary job `first` has it.

        The rate of the task is looked up anew. `may_ask`: False where that must not wait for Postgres.
        """
        asks = self._may_ask if may_ask else lambda: False
        if self._stores.settings.learn_run_times:
            self._stores.learned.refresh(asks)
        return NewJob(
            job,
            first.name,
            first.shape,
            message,
            first.priority,
            first.declared,
            first.queue,
            rerun=first.rerun,
            root_id=job,
            constraints=self._rates.constraints({"task": first.name, HEADER: {}}, HEADER, asks),
            expected_ms=first.expected_ms,
            key_limits=first.key_limits,
        )


def _term_of(carried: Mapping[str, Any]) -> str:
    """Return the term of the tenant that the platform's header names. Raises `InvalidRequest`."""
    return tenant_term(check_tenant(carried.get(TENANT, DEFAULT_TENANT)))


def run_time_of(wire: Mapping[str, Any], learned: int = 0) -> RunTime:
    """Return the run time of a message's job: the declared or the learned one, under the time limits.

    Raises `InvalidRequest`.
    """
    carried = wire[HEADER]
    expected, declared = carried.get(EXPECTED_MS, 0), carried.get(LIMITS)
    if type(expected) is not int or not 0 <= expected <= LONGEST_MS:
        raise InvalidRequest(
            f"{EXPECTED_MS} {show(expected)} in the headers is not valid",
            value=expected,
            advice="Give `expected` to apply_async, and leave the platform's header as it is.",
        )
    carried_limits, (hard, soft) = to_limits(wire.get("timelimit")), _declared_limits(declared)
    return within_limits(expected or learned, Limits(carried_limits.hard or hard, carried_limits.soft or soft))


def _declared_limits(value: Any) -> Limits:
    """Return the time limits that the router wrote into the header. Those of any other form are none."""
    if not isinstance(value, list) or [type(limit) for limit in value] != [int, int]:
        return NO_LIMITS
    return Limits(*(limit if 0 <= limit <= LONGEST_MS else 0 for limit in value))


def _wire_properties(properties: Mapping[str, Any], queue: str, priority: int, *, expires: bool) -> dict[str, Any]:
    """Return the properties of a message as Celery's consumer expects them, with those that its caller added.

    `expires`: True if the job expires. Celery makes the property `expiration` of that, and the row has the time.
    Raises `InvalidRequest` for a property that is no value of JSON.
    """
    added = properties.keys() - _NOT_CARRIED - ({"expiration"} if expires else set())
    return {
        **{name: _wire_property(name, properties[name]) for name in sorted(added)},
        "correlation_id": properties.get("correlation_id"),
        "reply_to": properties.get("reply_to"),
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": priority,
    }


def _wire_property(name: str, value: Any) -> Any:
    """Return a property as a message in JSON has it, in kombu's form: a time is {"__type__": "datetime", ...}."""
    try:
        if name == "expiration" and isinstance(value, (int, float)):
            # Kombu's producers take seconds, and send milliseconds.
            return str(int(value * 1000))
        return json.loads(kombu_json.dumps(value))
    except (TypeError, ValueError, OverflowError, RecursionError, EncodeError) as error:
        raise InvalidRequest(
            f"the property {name} of the message, {show(value)}, cannot be written as JSON",
            value=value,
            advice="Pass text, numbers, lists or dicts, or leave it out.",
        ) from error


class NotEncodable(InvalidRequest, EncodeError):
    """Arguments that the serialiser cannot write. It is also the `EncodeError` that kombu raises there."""


def encode_body(
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
