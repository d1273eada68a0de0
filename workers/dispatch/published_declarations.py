"""Declarations that workers published, for a sender that does not have the tasks.

The ledger has them, and Postgres while the ledger does not answer or has none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from sqlalchemy import Engine

from celery_capacity.routing.config.task_rules import RERUN
from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.snapshot import text
from celery_capacity.routing.model.expected import EXPECTED_MS, LIMITS, NO_LIMITS, Limits
from celery_capacity.routing.model.request import REQUESTS, TENANT, Request, alternatives_of
from celery_capacity.routing.policy.labels import ANYWHERE, Place, place_of
from celery_capacity.routing.store import queries, worker_rows
from celery_capacity.routing.store.worker_rows import DeclarationRow

#: Task name -> its declaration, as workers publish it (`workers.submit.router.declaration`).
Declarations = Mapping[str, Mapping[str, Any]]
#: Question to the ledger: its answer is a list.
Question = Callable[[Ledger], list[Any]]
#: Seconds for which a sender trusts the declarations that it read.
DECLARATIONS_FOR: Final = 10.0
#: Key of a declaration in this process: its `EXPECTED_MS`, `LIMITS`, `TENANT`, `PLACE` and `REQUESTS`. They have a key
#: of Redis and a column of Postgres of their own, because an older release reads each declaration as a request.
TIMES: Final = "times"
#: Key of the terms that say where the jobs of a task may run, beside its times.
PLACE: Final = "place"


class Declared(NamedTuple):
    """The declaration of a task. `tenant`: None where the task names none. `alternatives`: empty for one request."""

    request: Request
    reruns: bool = True
    expected_ms: int = 0
    limits: Limits = NO_LIMITS
    tenant: str | None = None
    place: Place = ANYWHERE
    alternatives: tuple[Request, ...] = ()


class PublishedDeclarations:
    """Published declarations by task name, read at most every `DECLARATIONS_FOR` seconds."""

    def __init__(self, ask: Callable[[Question], list[Any] | None], engine: Callable[[], Engine]) -> None:
        """Take the way to ask the ledger, which returns None where it does not answer, and the engine for Postgres."""
        self._ask_ledger = ask
        self._engine = engine
        self._read: dict[str, Declared] = {}
        self._until = 0.0

    def of(self, name: str) -> Declared | None:
        """Return the declaration of a task; None where no worker has published one."""
        now = time.monotonic()
        if now >= self._until:
            self._until = now + DECLARATIONS_FOR
            # Without an answer, the declarations that were read before stay in use.
            self._read = {name: _declared(*published) for name, published in self._ask().items()} or self._read
        return self._read.get(name)

    def forget(self) -> None:
        """Read the declarations anew at the next question."""
        self._until = 0.0

    def _ask(self) -> Mapping[str, DeclarationRow]:
        try:
            reply: Any = self._ask_ledger(_read_declarations)
            if reply is None or not reply[0]:
                return self._ask_postgres()
        except PlatformError:
            # The submit itself reports the error.
            return {}
        requests, options = ({text(key): json.loads(value) for key, value in part.items()} for part in reply)
        return {name: DeclarationRow(fields, options.get(name)) for name, fields in requests.items()}

    def _ask_postgres(self) -> Mapping[str, DeclarationRow]:
        with translated(), self._engine().connect() as connection:
            return worker_rows.declarations(connection) if queries.may_read(connection, "declarations") else {}


def parts_of(declared: Declarations) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the requests of tasks, and the other options of those that declare some, by task name."""
    requests = {name: {key: fields[key] for key in fields if key != TIMES} for name, fields in declared.items()}
    return requests, {name: fields[TIMES] for name, fields in declared.items() if TIMES in fields}


def _declared(request: Mapping[str, Any], options: Mapping[str, Any] | None) -> Declared:
    options = options or {}
    return Declared(
        Request.from_people({name: value for name, value in request.items() if name != RERUN}),
        request.get(RERUN, True) is not False,
        int(options.get(EXPECTED_MS) or 0),
        Limits(*options.get(LIMITS) or NO_LIMITS),
        options.get(TENANT),
        place_of(options[PLACE]) if PLACE in options else ANYWHERE,
        alternatives_of(options[REQUESTS]) if REQUESTS in options else (),
    )


def _read_declarations(ledger: Ledger) -> list[Any]:
    pipe = ledger.client.pipeline(transaction=False)
    pipe.hgetall(keys.DECLARATIONS)
    pipe.hgetall(keys.DECLARED_TIMES)
    return list(pipe.execute())
