"""A module that gives a worker settings of Celery: `CONFIGURED` in its environment is a JSON object of them.

A worker imports this module before it looks at any of them. With `SIGNED`, a folder with key.pem and cert.crt, the
worker signs and verifies messages by Celery's serializer `auth`.
"""

from __future__ import annotations

import json
import os

from celery import current_app

if settings := os.environ.get("CONFIGURED"):
    current_app.conf.update(json.loads(settings))

if folder := os.environ.get("SIGNED"):
    current_app.conf.update(
        security_key=f"{folder}/key.pem",
        security_certificate=f"{folder}/cert.crt",
        security_cert_store=f"{folder}/*.crt",
        task_serializer="auth",
        accept_content=["auth"],
    )
    current_app.setup_security()
