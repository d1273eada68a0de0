"""A configuration whose pools may be restarted by remote control."""

from __future__ import annotations

from celery import current_app

current_app.conf.worker_pool_restarts = True
