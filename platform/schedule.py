"""Beat's schedule of the platform: heartbeat every 30 s, sweep every 10 s, reconcile every 300 s (by the settings).

The entries themselves are `workers.broker.beat_messages.beat_entries`, since apps that `install` the platform have them
too; here is what the platform's own app adds: beat says nothing of its ticks.
"""

from __future__ import annotations

from typing import Any

from celery import Celery, signals


def connect(app: Celery) -> None:
    """Called once, when the app is made."""
    signals.beat_init.connect(_say, weak=False, dispatch_uid="celery-capacity.beat")


def _say(sender: Any = None, **_: Any) -> None:
    """In beat's log: what it will tick for."""
    entries = sender.app.conf.beat_schedule
    for name in sorted(entries):
        sender.app.log.get_default_logger().info("schedule: %s every %s", name, entries[name]["schedule"])
