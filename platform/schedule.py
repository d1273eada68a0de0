"""Beat's schedule of the platform: by default heartbeat every 30 s, sweep every 10 s, reconcile every 300 s.

The settings may change these intervals. The entries themselves are `workers.broker.beat_messages.beat_entries`, because
apps that `install` the platform have them too. Here is only an addition of the platform's own app: at its start, beat
logs a line for each entry.
"""

from __future__ import annotations

from typing import Any

from celery import Celery, signals


def connect(app: Celery) -> None:
    """Connect the log line to beat's start. Called once, when the app is made."""
    signals.beat_init.connect(_say, weak=False, dispatch_uid="celery-capacity.beat")


def _say(sender: Any = None, **_: Any) -> None:
    """Log, in beat's log, each entry of the schedule with its interval."""
    entries = sender.app.conf.beat_schedule
    for name in sorted(entries):
        sender.app.log.get_default_logger().info("schedule: %s every %s", name, entries[name]["schedule"])
