"""The platform's own messages: beat's ticks, which every worker hears, and which make no job."""

from __future__ import annotations

from typing import Any, Final

from kombu import Exchange, Queue
from kombu.utils.uuid import uuid

from routing.settings import Settings
from workers.router import PLATFORM_PREFIX

EXCHANGE: Final = Exchange("platform.ticks", type="fanout", durable=False, delivery_mode="transient")
HEARTBEAT: Final = PLATFORM_PREFIX + "heartbeat"
SWEEP: Final = PLATFORM_PREFIX + "sweep"
RECONCILE: Final = PLATFORM_PREFIX + "reconcile"
NAMES: Final = frozenset({HEARTBEAT, SWEEP, RECONCILE})


def queue() -> Queue:
    """A queue of this process alone, gone with its connection."""
    return Queue(f"platform.ticks.{uuid()}", EXCHANGE, durable=False, auto_delete=True, exclusive=True)


def publish(producer: Any, name: str) -> None:
    """Tell every worker."""
    producer.publish(
        {"tick": name}, exchange=EXCHANGE, routing_key="", serializer="json", declare=[EXCHANGE], retry=False
    )


def beat_entries(settings: Settings) -> dict[str, dict[str, Any]]:
    """The platform's entries for beat's schedule. The 1 s duties run on the workers' own timers."""
    return {
        "platform: heartbeat": {"task": HEARTBEAT, "schedule": settings.heartbeat_interval},
        "platform: sweep": {"task": SWEEP, "schedule": settings.sweep_interval},
        "platform: reconcile": {"task": RECONCILE, "schedule": settings.reconcile_interval},
    }
