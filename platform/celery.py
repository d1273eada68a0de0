"""The app of `celery -A platform`.

Without URLs in the environment, the user's running embedded servers serve the app. Only `up` and `demo` start servers:
a worker or a question that started a pair of its own would be a platform without jobs.
"""

from __future__ import annotations

from celery_capacity import create_app
from celery_capacity.platform import schedule, tasks

app = create_app("platform", include=[tasks.__name__])
schedule.connect(app)
