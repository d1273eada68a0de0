"""A small project's settings. What begins with CELERY_ is Celery's; servers are named by REDIS_URL and DATABASE_URL."""

import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent

SECRET_KEY = os.environ.get("SECRET_KEY", "of an example, which nobody serves")
DEBUG = False
ALLOWED_HOSTS = ["localhost", "testserver"]
INSTALLED_APPS = ["shop.orders"]
ROOT_URLCONF = "shop.urls"
USE_TZ = True

# The shop's own database. The platform's Postgres is another matter, and needs no entry here.
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("SHOP_DATABASE", FOLDER / "shop.sqlite3"),
    }
}

CELERY_TASK_TRACK_STARTED = True
CELERY_BEAT_SCHEDULE = {
    "ship what was paid": {"task": "shop.orders.tasks.ship_paid", "schedule": 60.0, "options": {"cpus": 0.5}},
}
