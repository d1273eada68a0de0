"""A module for workers of fault tests: it sets Celery's own waits, which no setting bounds, to a tenth.

By default Celery tries its broker again after 2, 4, … 30 s. Here it tries again after 1 s each time.
"""

from __future__ import annotations

import os
from typing import Final

from celery import current_app
from kombu import Connection

#: Seconds between two tries of the broker, and for an answer of it.
RECONNECT: Final = 1.0
ANSWER: Final = 2.0

ensure = Connection._ensure_connection
names = ensure.__code__.co_varnames[1 : ensure.__code__.co_argcount]
bounds = {"interval_start": RECONNECT, "interval_step": 0.0, "interval_max": RECONNECT}
ensure.__defaults__ = tuple(
    bounds.get(name, value) for name, value in zip(names[-len(ensure.__defaults__) :], ensure.__defaults__, strict=True)
)

current_app.conf.broker_transport_options = {
    **current_app.conf.broker_transport_options,
    "socket_timeout": ANSWER,
    "socket_connect_timeout": RECONNECT,
    "health_check_interval": 1,
}
if seconds := os.environ.get("SOFT_SHUTDOWN_SECONDS"):
    current_app.conf.worker_soft_shutdown_timeout = float(seconds)
