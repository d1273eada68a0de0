"""The app of `celery -A platform`. Without URLs in the environment the user's embedded servers serve; the first
command that needs them starts them."""

from __future__ import annotations

import sys
from types import TracebackType

# First: it says when a module of the user's hides one of ours, which the imports below would only stumble over.
from celery_capacity import create_app

from platform import schedule, servers  # isort: skip
from platform import tasks as _tasks  # isort: skip
from routing.errors import PlatformError


def _say_cleanly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What a user got wrong ends one of Celery's own commands with its message, as it ends ours."""
    if isinstance(error, PlatformError):
        print(f"celery-capacity: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _say_cleanly

app = create_app("platform", include=[_tasks.__name__], resolve=servers.ensure)
schedule.connect(app)
