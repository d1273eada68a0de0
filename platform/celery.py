"""The app of `celery -A platform`. Without URLs in the environment the user's embedded servers serve; the first
command that needs them starts them."""

from __future__ import annotations

# First: it says when a module of the user's hides one of ours, which the imports below would only stumble over.
from celery_capacity import create_app

from platform import schedule, servers  # isort: skip
from platform import tasks as _tasks  # isort: skip

app = create_app("platform", include=[_tasks.__name__], resolve=servers.ensure)
schedule.connect(app)
