"""Celery's side of the platform: the app, the sender, the worker's steps and duties.

Kept empty: every `celery` command imports this package for `workers.plugin`.
"""
