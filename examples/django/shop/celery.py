"""The Celery app, as in Celery's own documentation for Django; `install` is the only line that is not there."""

import os

from celery import Celery

from celery_capacity import install

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")

app = install(Celery("shop"))
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
