"""Install the platform on each app that a process of Celery's suite makes."""

from __future__ import annotations

from functools import wraps
from typing import Any

from celery import Celery

from celery_capacity import install


def connect() -> None:
    """Have each new app of this process be one of the platform."""
    plain = Celery.__init__
    if hasattr(plain, "__wrapped__"):
        return

    @wraps(plain)
    def init(self: Celery, *args: Any, **options: Any) -> None:
        plain(self, *args, **options)
        install(self)

    Celery.__init__ = init
