"""A module that sets one option of the worker to its value in plain Celery.

`CELERYS_OWN=<option>=<JSON>` in the worker's environment names it. A worker imports this module before it connects to
its broker.
"""

from __future__ import annotations

import json
import os

from celery import current_app

if setting := os.environ.get("CELERYS_OWN"):
    name, _, value = setting.partition("=")
    current_app.conf[name] = json.loads(value)
