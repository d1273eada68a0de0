"""A Redis that Sentinels watch: they say where it is, on each new connection.

After a failover that is another server. Its `run_id` is another too, so the ledger is cold there and opened anew
(`routing.recovery.rebuild`): what a replica had not yet received of its books is not missed.
"""

from __future__ import annotations

from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel, SentinelManagedConnection

from celery_capacity.routing.config import timeouts
from celery_capacity.routing.config.redis_urls import Address


def asking(timeout: float = timeouts.STORE_TIMEOUT) -> dict[str, Any]:
    """Return redis-py's options for the Sentinels themselves; `timeout`: PLATFORM_STORE_TIMEOUT. A Sentinel that does
    not answer is passed over, and not tried again (redis-py tries ten times by default)."""
    within = timeouts.SENTINEL * timeout
    return {
        "socket_connect_timeout": within,
        "socket_timeout": within,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }


#: The ports of all servers that Sentinels have named to this process.
ports: Final[set[int]] = set()


class Watched(SentinelManagedConnection):
    """A connection to the server that the Sentinels name. It leads to no replica: Sentinels, too, may be late."""

    def connect_to(self, address: tuple[str, int]) -> None:
        ports.add(int(address[1]))
        super().connect_to(address)  # type: ignore[no-untyped-call]
        try:
            self._check_role(address)
        except BaseException:
            self.disconnect()  # type: ignore[no-untyped-call]
            raise

    def _check_role(self, address: tuple[str, int]) -> None:
        self.send_command("INFO", "replication")  # type: ignore[no-untyped-call]
        said = self.read_response()
        if b"role:master" not in (said if isinstance(said, bytes) else str(said).encode()):
            raise redis.ConnectionError(f"the Sentinels name {address[0]}:{address[1]}, which is not a primary (yet)")


class Sentinels(Sentinel):
    """All of an address. What they say when they name no primary is an error that a person can read."""

    def discover_master(self, service_name: str) -> tuple[str, int]:
        try:
            found: tuple[str, int] = super().discover_master(service_name)  # type: ignore[no-untyped-call]
        except MasterNotFoundError as error:
            asked = (one.connection_pool.connection_kwargs for one in self.sentinels)
            places = ", ".join(sorted(f"{place['host']}:{place['port']}" for place in asked))
            raise MasterNotFoundError(f"of the Sentinels {places} none names a primary {service_name!r}") from error
        return found


def client(address: Address, options: dict[str, Any], timeout: float) -> redis.Redis:
    """A client of the server that the Sentinels of an address watch; `options` are for its connections, `timeout` is
    PLATFORM_STORE_TIMEOUT."""
    ask = asking(timeout)
    shorter = {name: min(ask[name], options[name]) for name in ask.keys() & options.keys() if name.startswith("socket")}
    sentinel = Sentinels(list(address.hosts), sentinel_kwargs={**ask, **shorter})  # type: ignore[no-untyped-call]
    found: redis.Redis = sentinel.master_for(  # type: ignore[no-untyped-call]
        address.master,
        connection_class=Watched,
        username=address.user,
        password=address.password,
        db=address.number,
        **options,
    )
    return found
