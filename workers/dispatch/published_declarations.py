"""Declarations that workers published, for a sender that does not have the tasks.

The ledger has them. Postgres is read while the ledger does not answer, or lacks the task that is asked for.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Set
from typing import Any, Final, NamedTuple

from sqlalchemy import Engine

from celery_capacity.routing.config.task_rules import RERUN
from celery_capacity.routing.config.timeouts import STORE_TIMEOUT
from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.errors import InvalidRequest, NotAccepted, PlatformError, StoreUnavailable
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.ledger.replies import LedgerClosed
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


class _Texts(NamedTuple):
    """The declaration of a task in the ledger: JSON as it was read."""

    request: bytes
    options: bytes | None


class PublishedDeclarations:
    """Published declarations by task name.

    The ledger is read at most every `DECLARATIONS_FOR` seconds, and so is Postgres. A failed reading does not count.
    """

    def __init__(
        self,
        ask: Callable[[Question], list[Any] | None],
        engine: Callable[[], Engine],
        wait: Callable[[], float] = lambda: STORE_TIMEOUT,
    ) -> None:
        """Take the way to ask the ledger, which returns None where it does not answer, and the engine for Postgres.

        `wait`: seconds for which a thread waits for the reading of another one.
        """
        self._ask_ledger = ask
        self._engine = engine
        self._wait = wait
        self._rows: Mapping[str, DeclarationRow | _Texts] = {}
        self._declared: dict[str, Declared] = {}
        self._in_ledger: Set[str] = frozenset()
        #: Times until which the ledger's rows are trusted, and those of Postgres, with its lack of a row.
        self._until = self._others_until = 0.0
        self._reading, self._pid = threading.Lock(), os.getpid()

    def of(self, name: str) -> Declared | None:
        """Return the declaration of a task; None where no worker has published one.

        Raises `NotAccepted` where nothing is known of the task and Postgres does not answer, and `InvalidRequest` where
        its declaration cannot be read.
        """
        if not self._is_known(name):
            self._read(name)
        declared = self._declared.get(name)
        if declared is None and (row := self._rows.get(name)) is not None:
            declared = self._declared[name] = _parsed(name, row)
        return declared

    def forget(self) -> None:
        """Read the declarations anew at the next question."""
        self._until = self._others_until = 0.0

    def _is_known(self, name: str) -> bool:
        return time.monotonic() < (self._until if name in self._in_ledger else self._others_until)

    def _read(self, name: str) -> None:
        """Read the stores in one thread at a time. An older declaration stays in use meanwhile, and after an error."""
        if self._pid != os.getpid():
            # The thread that held the lock does not exist in a forked child.
            self._reading, self._pid = threading.Lock(), os.getpid()
        reading = self._reading
        if not reading.acquire(blocking=False):
            if name in self._rows:
                return
            if not reading.acquire(timeout=self._wait()):
                raise NotAccepted(f"the declaration of task {name} could not be read in time")
        try:
            if not self._is_known(name):
                self._read_stores(name)
        except StoreUnavailable as error:
            if name not in self._rows:
                raise NotAccepted(f"the declaration of task {name} cannot be read: {error.message}") from error
        finally:
            reading.release()

    def _read_stores(self, name: str) -> None:
        now = time.monotonic()
        in_ledger = self._ask()
        if in_ledger is not None and name in in_ledger:
            self._take({}, in_ledger)
            self._until = now + DECLARATIONS_FOR
            return
        # Postgres is the truth: a ledger that lost its data has only the tasks of workers that are back.
        self._take(self._ask_postgres(), in_ledger or {})
        self._until = self._others_until = now + DECLARATIONS_FOR

    def _take(self, in_postgres: Mapping[str, DeclarationRow], in_ledger: Mapping[str, _Texts]) -> None:
        # Rows that were read before stay: a role that may not read Postgres has no others while Redis is away.
        self._rows, self._declared = {**self._rows, **in_postgres, **in_ledger}, {}
        self._in_ledger = in_ledger.keys()

    def _ask(self) -> Mapping[str, _Texts] | None:
        """Return the texts in the ledger, None where it does not answer."""
        try:
            reply: Any = self._ask_ledger(_read_declarations)
        except (StoreUnavailable, LedgerClosed):
            return None
        if reply is None:
            return None
        requests, options = ({text(key): value for key, value in part.items()} for part in reply)
        return {name: _Texts(request, options.get(name)) for name, request in requests.items()}

    def _ask_postgres(self) -> Mapping[str, DeclarationRow]:
        with translated(), self._engine().connect() as connection:
            return worker_rows.declarations(connection) if queries.may_read(connection, "declarations") else {}


def _parsed(name: str, row: DeclarationRow | _Texts) -> Declared:
    """Return the declaration in a row. An unreadable row concerns its own task alone."""
    try:
        if isinstance(row, _Texts):
            row = DeclarationRow(json.loads(row.request), None if row.options is None else json.loads(row.options))
        return _declared(*row)
    except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError, RecursionError) as error:
        reason = error.message if isinstance(error, PlatformError) else f"{type(error).__name__}: {error}"
        raise InvalidRequest(
            f"the published declaration of task {name} cannot be read ({reason})",
            value=name,
            advice="Upgrade this program if a later release published it. Else start a worker that has the task, which"
            " publishes it anew.",
        ) from error


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
