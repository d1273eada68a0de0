"""The app of `celery -A platform`. Without URLs in the environment the user's embedded servers serve; the first
command that needs them starts them."""

from __future__ import annotations

import sys

# First: it says when a module of the user's hides one of ours, which the imports below would only stumble over.
try:
    from celery_capacity import create_app
except RuntimeError as hidden:  # ModuleHidden; of an error in an app's module Celery would show the traceback
    print(f"celery-capacity: {hidden}", file=sys.stderr)
    raise SystemExit(78) from None  # Exit.CONFIGURATION, which may be what is hidden

from platform import schedule, servers  # isort: skip
from platform import tasks as _tasks  # isort: skip

app = create_app("platform", include=[_tasks.__name__], resolve=servers.ensure)
schedule.connect(app)
