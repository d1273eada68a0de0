"""What is looked at before a worker joins: tables, Redis's eviction, and other workers on this machine."""

from __future__ import annotations

import redis
from redis.exceptions import RedisError, ResponseError
from sqlalchemy import Engine

from migrations import check as check_tables
from routing import roster
from routing.books import text
from routing.errors import PlatformError, StoreUnavailable, Unsupported, mask_url
from routing.settings import Settings
from workers.identity import Identity

#: The only policy under which books are never evicted: a book that is gone closes its worker, a whole ledger that is
#: gone stops admission until it is rebuilt.
NO_EVICTION = "noeviction"


def check_stores(engine: Engine, client: redis.Redis, settings: Settings) -> None:
    """Raise what would make this worker useless: tables that are missing or old, a Redis that evicts keys."""
    check_tables(engine)
    try:
        limit = client.config_get("maxmemory").get("maxmemory", "0")
        policy = text(client.config_get("maxmemory-policy").get("maxmemory-policy", NO_EVICTION))
    except ResponseError:
        # CONFIG is often closed to users: then whoever runs the server has to know (docs: real servers).
        return
    except RedisError as error:
        raise StoreUnavailable(f"Redis at {mask_url(str(settings.redis_url))} does not answer: {error}") from error
    if int(limit or 0) > 0 and policy != NO_EVICTION:
        raise PlatformError(
            f"Redis evicts keys when it is full (maxmemory-policy {policy})",
            value=policy,
            advice=f"Set maxmemory-policy to {NO_EVICTION}: the ledger's books must not vanish.",
        )


def check_broker(broker_url: str, settings: Settings) -> None:
    """Raise where messages would come from elsewhere than from where the scripts push them."""
    if broker_url != settings.redis_url:
        raise Unsupported(
            "a broker other than the ledger's Redis is not supported yet",
            value=broker_url,
            advice="Leave the broker out of the app and CELERY_BROKER_URL out of the environment, or name REDIS_URL.",
        )


def neighbours(engine: Engine, settings: Settings, identity: Identity) -> list[str]:
    """Live workers on this machine that publish it as well, when this one publishes the whole of it."""
    if settings.cpus is not None:
        return []
    with engine.connect() as connection:
        return roster.live_on_machine(connection, identity.boot_id, identity.name, settings.worker_ttl)
