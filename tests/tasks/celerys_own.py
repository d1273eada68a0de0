"""Gives one option of the worker the value that it has in plain Celery, by `CELERYS_OWN=<option>=<JSON>` in its
environment.

(A worker imports this before it connects to its broker.)
"""

from __future__ import annotations

import json
import os

from celery import current_app

if given := os.environ.get("CELERYS_OWN"):
    name, _, value = given.partition("=")
    current_app.conf[name] = json.loads(value)
