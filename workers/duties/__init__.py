"""Duties: what repairs the steps that a crash left undone. One file and one function each: one pass, returning counts.

Every duty is guarded by state and token, safe to run twice at once, and by hand. One elected worker runs them on its
own timers; beat's ticks ask for them sooner.
"""

from __future__ import annotations

from celery_capacity.workers.duties.opening import open_ledger
from celery_capacity.workers.duties.runner import DUTIES, OUTBOX, Duty, Runner

__all__ = ["DUTIES", "OUTBOX", "Duty", "Runner", "open_ledger"]
