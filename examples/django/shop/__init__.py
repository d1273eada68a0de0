"""The project. Importing it makes the Celery app, so that `@shared_task` finds it in every process of Django."""

from shop.celery import app as celery_app

__all__ = ["celery_app"]
