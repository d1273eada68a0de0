"""Checks before a worker joins: tables, Redis's eviction, the broker, and other workers on this machine."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import redis
from celery import Celery
from celery.exceptions import ImproperlyConfigured
from celery.utils.imports import cwd_in_path
from redis.exceptions import RedisError, ResponseError
from sqlalchemy import Engine

from celery_capacity.migrations import check as check_tables
from celery_capacity.routing.config import redis_urls
from celery_capacity.routing.config.machine import detect, is_whole
from celery_capacity.routing.config.redis_urls import BETWEEN, Address
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import PlatformError, SettingsError, StoreUnavailable, Unsupported, mask_url
from celery_capacity.routing.ledger.snapshot import text
from celery_capacity.routing.model.amounts import CPUS, MEMORY
from celery_capacity.routing.store import worker_rows
from celery_capacity.workers.process.identity import Identity

logger = logging.getLogger(__name__)

#: The only eviction policy under which books are never evicted. A missing book closes its worker. A missing ledger
#: stops admission until it is rebuilt.
NO_EVICTION = "noeviction"

#: Settings by which workers of one machine share it, each with its resource and the word for that.
_SHARED: Final = {"PLATFORM_CPUS": (CPUS, "CPUs"), "PLATFORM_MEMORY": (MEMORY, "memory")}

#: Brokers that a worker can listen to beside its main loop. Kombu's `memory`, `filesystem` and the like live in one
#: process, or are only polled.
BROKERS: Final = ("redis", "rediss", "redis+socket", "sentinel", "amqp", "amqps", "pyamqp")


def check_stores(engine: Engine, client: redis.Redis, settings: Settings) -> None:
    """Raise an error where this worker would be useless: tables that are missing or old, a Redis that evicts keys."""
    if newer := check_tables(engine):
        logger.warning("Postgres is at revision %s, of a newer version of the platform: upgrade this worker", newer)
    try:
        limit = client.config_get("maxmemory").get("maxmemory", "0")
        policy = text(client.config_get("maxmemory-policy").get("maxmemory-policy", NO_EVICTION))
    except ResponseError:
        # CONFIG is often closed to users: then the server's operator has to know (docs: real servers).
        return
    except RedisError as error:
        raise StoreUnavailable(f"Redis at {mask_url(str(settings.redis_url))} does not answer: {error}") from error
    if int(limit or 0) > 0 and policy != NO_EVICTION:
        raise PlatformError(
            f"Redis evicts keys when it is full (maxmemory-policy {policy})",
            value=policy,
            advice=f"Set maxmemory-policy to {NO_EVICTION}: the ledger's books must not vanish.",
        )


def check_broker(broker_url: object) -> None:
    """Raise `Unsupported` where Celery's own messages would use a broker that no worker can listen to.

    The argument is as Celery takes it: a URL, several with `;` between them, or a list.
    """
    for url in _urls(broker_url):
        scheme = url.partition("://")[0]
        if "://" not in url or scheme not in BROKERS:
            raise Unsupported(
                f"a broker with {scheme}:// is not supported" if "://" in url else "a broker must be named by its URL",
                value=url,
                advice=f"Use one with {', '.join(f'{name}://' for name in BROKERS)}, or leave the broker out of the "
                "app and CELERY_BROKER_URL out of the environment: then the ledger's Redis serves.",
            )


def check_results(app: Celery) -> None:
    """Raise `Unsupported` where the app's results cannot be kept: the store is unknown, or its driver is missing."""
    try:
        app.backend  # noqa: B018 - made at its first use
    except (ImportError, AttributeError, ImproperlyConfigured) as error:
        raise Unsupported(
            f"results cannot be kept in {mask_url(str(app.conf.result_backend))}: {' '.join(str(error).split())}",
            advice="Leave the backend out of the app and CELERY_RESULT_BACKEND out of the environment: then the"
            " ledger's Redis serves. Or name one that Celery knows, and install its driver.",
        ) from error


def missing_modules(names: Iterable[str]) -> list[str]:
    """Return the names that no module has, in the working folder nor among what is installed."""
    with cwd_in_path():
        return [name for name in names if not _is_there(name)]


def check_imports(names: Iterable[str], source: str = "PLATFORM_IMPORTS") -> None:
    """Raise `SettingsError` where a module is missing that `source` names.

    An import that fails within such a module is its author's affair, and keeps its traceback.
    """
    if missing := missing_modules(names):
        raise SettingsError(
            [
                f"{source} names {name!r}, and there is no such module in {Path.cwd()} nor among what is"
                f" installed for {sys.executable}. Start in the folder where it is, or install it."
                for name in missing
            ]
        )


def _is_there(name: str) -> bool:
    try:
        return name in sys.modules or find_spec(name) is not None
    except ModuleNotFoundError as error:
        # If another module is the missing one, this one is there and needs that other.
        return not f"{name}.".startswith(f"{error.name}.")


def shares_ledger(app: Celery, settings: Settings) -> bool:
    """Return True if Celery's broker is the very database of the ledger, with the very names of keys.

    The scripts push the messages of jobs there. False where that is not certain, which is always safe.
    """
    options = app.conf.broker_transport_options or {}
    if options.get("global_keyprefix"):
        return False
    broker_url = BETWEEN.join(_urls(app.conf.broker_read_url))
    try:
        broker, ledger = redis_urls.read(broker_url), redis_urls.read(str(settings.redis_url))
    except ValueError:
        # The broker is another kind of server, or several to choose from.
        return False
    master = broker.master or str(options.get(redis_urls.MASTER) or "")
    return _target(replace(broker, master=master)) == _target(ledger)


def _urls(broker_url: object) -> list[str]:
    values = broker_url if isinstance(broker_url, list | tuple) else [broker_url]
    return [url for value in values for url in str(value).split(BETWEEN)]


def _target(address: Address) -> tuple[object, ...]:
    """Return the target, the user and the options of an address. Sentinels of one Redis may be named in any order."""
    hosts = frozenset((host.lower(), port) for host, port in address.hosts)
    return (
        *(address.scheme, hosts, address.path, address.number, address.master),
        *(address.user or "", address.password or "", frozenset(address.query)),
    )


def whole_machine(settings: Settings) -> dict[str, str]:
    """Return the settings without which this worker publishes all of a machine's resource, each with the resource.

    A quota or limit of its cgroup is the worker's own, so it takes the place of a setting.
    """
    sources = detect(settings).sources
    return {setting: word for setting, (name, word) in _SHARED.items() if is_whole(sources.get(name, ""))}


def neighbours(engine: Engine, settings: Settings, identity: Identity) -> list[str]:
    """Return the other live workers on this machine."""
    with engine.connect() as connection:
        return worker_rows.live_on_machine(connection, identity.pid_space.boot, identity.name, settings.worker_ttl)
