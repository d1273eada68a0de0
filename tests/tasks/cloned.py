"""Let the worker that imports this run on a clone of its machine: another boot, and all else is equal."""

from __future__ import annotations

from celery_capacity.routing.config import process_identity


def boot_id() -> str:
    """Return the id of the clone's boot."""
    return "00000000-0000-4000-8000-00000000c10e:pid:[4026531836]"


process_identity.boot_id = boot_id
