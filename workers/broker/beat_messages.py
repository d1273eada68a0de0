"""The platform's own messages: beat's ticks, which every worker hears, and which make no job."""

from __future__ import annotations

import base64
import json
from typing import Any, Final

from kombu import Exchange, Queue
from kombu.utils.uuid import uuid

from celery_capacity.routing.config import redis_urls
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.model.message import PLATFORM_PREFIX

EXCHANGE: Final = Exchange("platform.ticks", type="fanout", durable=False, delivery_mode="transient")
HEARTBEAT: Final = PLATFORM_PREFIX + "heartbeat"
SWEEP: Final = PLATFORM_PREFIX + "sweep"
RECONCILE: Final = PLATFORM_PREFIX + "reconcile"
#: Prefix that kombu writes in front of the channels of an exchange.
KOMBU_PREFIX: Final = "/{db}."
NAMES: Final = frozenset({HEARTBEAT, SWEEP, RECONCILE})


def queue() -> Queue:
    """Return a queue of this process alone, which is gone with its connection."""
    return Queue(f"platform.ticks.{uuid()}", EXCHANGE, durable=False, auto_delete=True, exclusive=True)


def channel(app: Any) -> str:
    """Return the channel on which Celery's broker publishes ticks, where that is a Redis."""
    options = app.conf.broker_transport_options or {}
    number = redis_urls.read(str(app.platform.settings.redis_url)).number
    prefix = options.get("fanout_prefix", True)
    # Like in kombu, True stands for its own prefix.
    return f"{KOMBU_PREFIX if prefix is True else prefix or ''}{EXCHANGE.name}".format(db=number)


def read(raw: Any) -> str | None:
    """Return the name of a tick as the broker's Redis publishes it, None where it is no tick."""
    try:
        envelope = json.loads(raw)
        body = envelope["body"]
        if envelope["properties"].get("body_encoding") == "base64":
            body = base64.b64decode(body)
        name = json.loads(body)["tick"]
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    return name if isinstance(name, str) else None


def publish(producer: Any, name: str) -> None:
    """Publish a tick to every worker."""
    producer.publish(
        {"tick": name}, exchange=EXCHANGE, routing_key="", serializer="json", declare=[EXCHANGE], retry=False
    )


def beat_entries(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return the platform's entries for beat's schedule. The 1 s duties run on the workers' own timers."""
    return {
        "platform: heartbeat": {"task": HEARTBEAT, "schedule": settings.heartbeat_interval},
        "platform: sweep": {"task": SWEEP, "schedule": settings.sweep_interval},
        "platform: reconcile": {"task": RECONCILE, "schedule": settings.reconcile_interval},
    }
