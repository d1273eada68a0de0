"""Moment from which jobs can be admitted to a worker: its pool is up, and its queue is consumed."""

from __future__ import annotations

import logging
import sys
from typing import Any

from celery_capacity.routing.config.machine import Machine, describe, exceeding
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.model.message import PLATFORM_PREFIX
from celery_capacity.workers.dispatch.published_declarations import Declarations
from celery_capacity.workers.execute.pool import slots_of
from celery_capacity.workers.execute.runtime import Runtime
from celery_capacity.workers.membership.preflight import neighbours, whole_machine
from celery_capacity.workers.process.exit_codes import Exit, code_of
from celery_capacity.workers.process.stores import Stores, stores_of
from celery_capacity.workers.process.waiting_for_stores import when_stores_answer
from celery_capacity.workers.submit.constraints import declare_rates
from celery_capacity.workers.submit.router import declaration

logger = logging.getLogger(__name__)
#: Logger of the line with the capacity, which people look for, and which is no warning.
capacity_logger = logging.getLogger(f"{__name__}.capacity")


def join(consumer: Any) -> None:
    """Register the worker of this consumer, and log the capacity that it published.

    Does nothing where its app is not the platform's.
    """
    app, stores = consumer.app, stores_of(consumer.app)
    if stores is None:
        return
    with refusing():
        runtime = consumer.runtime
        _warn_of_neighbours(stores, runtime)
        declare_rates(app, stores)
        detected, admitted = runtime.join(lambda: slots_of(consumer.controller), declarations(app, stores))
        _show_at_default_level(capacity_logger)
        capacity_logger.info(
            "worker %s published %s%s",
            runtime.identity.name,
            describe(detected),
            f"; {admitted} {'waiting job was' if admitted == 1 else 'waiting jobs were'} admitted" if admitted else "",
        )
        for sentence in exceeding(stores.settings, Machine().read()):
            logger.warning(sentence)


def _show_at_default_level(news: logging.Logger) -> None:
    """Show the INFO lines of a logger at Celery's default level, WARNING, too.

    A stricter level, and a level that the configuration gives this logger, hide them.
    """
    if news.level == logging.NOTSET and news.isEnabledFor(logging.WARNING):
        news.setLevel(logging.INFO)


def _warn_of_neighbours(stores: Stores, runtime: Runtime) -> None:
    """Log the other workers on this machine where their capacity and this worker's would count twice."""
    unset = whole_machine(stores.settings)
    if not unset:
        return
    others = when_stores_answer(
        lambda: neighbours(stores.engine, stores.settings, runtime.identity), runtime.wait_to_start
    )
    if others:
        logger.warning(
            "%s %s on this machine too, and each worker publishes all of its %s: set %s for each",
            ", ".join(others),
            "is" if len(others) == 1 else "are",
            " and ".join(unset.values()),
            " and ".join(unset),
        )


def declarations(app: Any, stores: Stores) -> Declarations:
    """Return the requests of all tasks that this worker knows, by name, without Celery's and the platform's own."""
    default = stores.settings.default_cpus
    return {
        name: declaration(task, default, stores.requests)
        for name, task in app.tasks.items()
        if not name.startswith((PLATFORM_PREFIX, "celery."))
    }


class refusing:  # noqa: N801 - reads as a statement
    """Context in which an error ends the start: a user's mistake by its message and exit code, without a traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, PlatformError):
            print(f"celery-capacity: {error}", file=sys.stderr, flush=True)
            code = code_of(error)
            # A refusal here concerns a name, an app or a declaration: part of the configuration.
            raise SystemExit(Exit.CONFIGURATION if code is Exit.FAILED else code) from None
        if isinstance(error, Exception):
            # Celery would log the error and say "ready." of a worker that nothing is admitted to.
            logger.critical("the worker cannot join the platform", exc_info=error)
            raise SystemExit(Exit.DEFECT) from None
