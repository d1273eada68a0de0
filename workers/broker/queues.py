"""The queue of a message, by Celery's exchanges, routing keys and bindings, resolved before it becomes a row.

No broker sees the exchange of a job. A job is in exactly one queue, so a message that a broker would copy to several
queues is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from kombu import Exchange, Queue

from celery_capacity.routing.errors import InvalidRequest, Unsupported, show
from celery_capacity.routing.model.identifiers import check_queue_name


def queue_of(queues: Mapping[str, Queue], exchange: Any, routing_key: str | None) -> str:
    """Return the name of the queue in which a message to this exchange, with this routing key, arrives.

    Raises `InvalidRequest` where there is none, `Unsupported` where the message would be copied.
    """
    name = exchange.name if isinstance(exchange, Exchange) else exchange
    if not name:
        return str(routing_key)
    key = routing_key or ""
    bound: set[str] = {
        queue.name for queue, kind, bound_key in _bindings(queues, name) if _matches(kind, bound_key, key)
    }
    if len(bound) == 1:
        return bound.pop()
    if bound:
        raise Unsupported(
            f"routing key {show(routing_key)} of exchange {show(name)} leads to {len(bound)} queues:"
            f" {', '.join(sorted(bound))}",
            value=routing_key,
            advice="A job is in one queue: name it (queue=...), or submit one job for each.",
        )
    raise InvalidRequest(
        f"no queue is bound to exchange {show(name)} with routing key {show(routing_key)}",
        value=routing_key,
        advice="Name the queue (queue=...), or declare it in task_queues with this exchange and key.",
    )


def check_queue(queue: Queue) -> Queue:
    """Return a queue, if jobs can be in it, or if a worker can serve it.

    Raises `InvalidRequest`, `Unsupported`.
    """
    for _, kind, _ in _bindings({queue.name: queue}, None):
        _check_kind(queue, kind)
    check_queue_name(queue.name)
    return queue


def as_queue(
    queues: Mapping[str, Queue],
    name: str,
    exchange: str | None = None,
    exchange_type: str | None = None,
    routing_key: str | None = None,
    **options: Any,
) -> Queue:
    """Return a declared queue, or else a new one by these options. Raises as `check_queue` does.

    Without options the queue is direct, with an exchange and a routing key of its name.
    """
    # Look first: Celery's mapping makes a missing queue when it is asked for one.
    if name in queues:
        return check_queue(queues[name])
    made = Exchange(exchange or name, exchange_type or "direct")
    return check_queue(Queue(name, made, routing_key or name, **options))


def _bindings(queues: Mapping[str, Queue], exchange: str | None) -> Iterator[tuple[Queue, str, str]]:
    """Yield (queue, type of the exchange, routing key) of all bindings to an exchange; None: to any."""
    for queue in list(queues.values()):
        primary = (queue.exchange, queue.routing_key)
        for to, key in (primary, *((binding.exchange, binding.routing_key) for binding in queue.bindings or ())):
            if to is not None and (exchange is None or to.name == exchange):
                _check_kind(queue, to.type)
                yield queue, to.type, key or ""


def _check_kind(queue: Queue, kind: str) -> None:
    if kind not in ("direct", "topic"):
        raise Unsupported(
            f"queue {show(queue.alias or queue.name)} is bound to an exchange of the type {kind}: a job is one, and is"
            " in one queue",
            value=kind,
            advice="Use a direct or topic exchange; to reach every worker use remote control (app.control.broadcast).",
        )


def _matches(kind: str, bound: str, key: str) -> bool:
    return bound == key if kind == "direct" else _topic(bound).fullmatch(f".{key}") is not None


@lru_cache(maxsize=1024)
def _topic(bound: str) -> re.Pattern[str]:
    """Compile a pattern of the keys that a topic binding takes, each key with a dot in front of every word.

    `*` stands for one word, `#` for any number of words.
    """
    words = {"*": r"\.[^.]+", "#": r"(?:\.[^.]+)*"}
    return re.compile("".join(words.get(word, r"\." + re.escape(word)) for word in bound.split(".")))
