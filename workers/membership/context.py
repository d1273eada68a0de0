"""Context of a worker: the parts that its threads share."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from sqlalchemy import Engine

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.workers.membership.authority_check import Confirmation
from celery_capacity.workers.membership.failover import Reachability
from celery_capacity.workers.process.holdings import Holdings
from celery_capacity.workers.process.identity import Identity
from celery_capacity.workers.results.outcome_writer import Recorder


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """Parts of one worker that more than one of its threads uses. Each is made once, before the threads."""

    settings: Settings
    engine: Engine
    #: The worker's own client: its epoch is that of the worker's registration.
    ledger: Ledger
    identity: Identity
    confirmation: Confirmation
    holdings: Holdings
    recorder: Recorder
    reachability: Reachability = field(default_factory=Reachability)
    #: Held while the ledger thread settles jobs, and while a heartbeat lists them.
    exclusive: threading.Lock = field(default_factory=threading.Lock)
