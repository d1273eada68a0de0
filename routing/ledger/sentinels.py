"""A Redis that Sentinels watch: they name its address for each new connection.

After a failover they name another server. The other server has another `run_id`, so the ledger is cold there and is
opened anew (`routing.recovery.rebuild`). So changes of the books that the replica had not yet received do no harm.
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
    """Return redis-py's options for connections to the Sentinels; `timeout`: PLATFORM_STORE_TIMEOUT, in seconds.

    A Sentinel that does not answer is passed over, and not tried again. By default redis-py tries ten times.
    """
    seconds = timeouts.SENTINEL * timeout
    return {
        "socket_connect_timeout": seconds,
        "socket_timeout": seconds,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }


#: The ports of all servers that Sentinels have named to this process.
ports: Final[set[int]] = set()


class PrimaryConnection(SentinelManagedConnection):
    """A connection to the server that the Sentinels name. A replica is refused, because Sentinels may be late."""

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
        reply = self.read_response()
        if b"role:master" not in (reply if isinstance(reply, bytes) else str(reply).encode()):
            raise redis.ConnectionError(f"the Sentinels name {address[0]}:{address[1]}, which is not a primary (yet)")


class Sentinels(Sentinel):
    """All Sentinels of an address. Where they name no primary, the error is one that a person can read."""

    def discover_master(self, service_name: str) -> tuple[str, int]:
        try:
            primary: tuple[str, int] = super().discover_master(service_name)  # type: ignore[no-untyped-call]
        except MasterNotFoundError as error:
            asked = (sentinel.connection_pool.connection_kwargs for sentinel in self.sentinels)
            addresses = ", ".join(sorted(f"{options['host']}:{options['port']}" for options in asked))
            raise MasterNotFoundError(f"of the Sentinels {addresses} none names a primary {service_name!r}") from error
        return primary


def client(address: Address, options: dict[str, Any], timeout: float) -> redis.Redis:
    """Return a client of the server that the Sentinels of an address watch.

    `options` are for its connections. `timeout`: PLATFORM_STORE_TIMEOUT, in seconds.
    """
    ask = asking(timeout)
    shorter = {name: min(ask[name], options[name]) for name in ask.keys() & options.keys() if name.startswith("socket")}
    sentinel = Sentinels(list(address.hosts), sentinel_kwargs={**ask, **shorter})  # type: ignore[no-untyped-call]
    primary: redis.Redis = sentinel.master_for(  # type: ignore[no-untyped-call]
        address.master,
        connection_class=PrimaryConnection,
        username=address.user,
        password=address.password,
        db=address.number,
        **options,
    )
    return primary
