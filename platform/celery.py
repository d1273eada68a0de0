"""The app of `celery -A platform`.

Without URLs in the environment, the embedded servers of the user serve the app. The first command that needs them
starts them.
"""

from __future__ import annotations

from celery_capacity import create_app
from celery_capacity.platform import schedule, tasks
from celery_capacity.platform.embedded import servers

app = create_app("platform", include=[tasks.__name__], resolve=servers.ensure)
schedule.connect(app)
