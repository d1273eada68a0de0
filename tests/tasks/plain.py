"""Plain Celery with the tasks of `tests.tasks.heard`, for comparisons with the platform.

It uses the same server, under a prefix of its own.
"""

from __future__ import annotations

import os
from typing import Any, Final

from celery import Celery

_APART: Final = {"global_keyprefix": "plain."}


def plain_app(url: str, **options: Any) -> Celery:
    """Return an app of plain Celery; `options` are its settings."""
    app = Celery("plain", broker=url, backend=url, set_as_current=False)
    app.conf.update(
        broker_transport_options=_APART,
        result_backend_transport_options=_APART,
        broker_connection_retry_on_startup=True,
        **options,
    )
    return app


if os.environ.get("TEST_PLAIN"):
    app = plain_app(os.environ["REDIS_URL"], imports=["tests.tasks.heard"])
    # The tasks are shared tasks, which belong to the default app.
    app.set_default()
