"""Shares of tenants for a forecast: their rules and the capacity by Postgres, and their past use by the ledger."""

from __future__ import annotations

from collections.abc import Mapping

import redis as redispy
from redis.exceptions import RedisError
from sqlalchemy import Connection

from celery_capacity.routing.database import tenants
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.policy.tenants import Sharing, mean_time
from celery_capacity.routing.simulation.shares import Shares


def read_shares(connection: Connection, client: redispy.Redis | None, halves_in: float) -> Shares | None:
    """Return the shares of tenants, None where tenants are not in use.

    What jobs hold is left out: a simulation counts it from the running jobs. `client`: None while Postgres decides, as
    past use does not count then. `halves_in`: the half-life of past use in seconds.
    """
    if not tenants.are_in_use(connection):
        return None
    sharing = Sharing(tenants.tenant_rules(connection), total=tenants.capacity(connection))
    return Shares(sharing) if client is None else with_past(sharing, client, halves_in)


def with_past(sharing: Sharing, client: redispy.Redis, halves_in: float) -> Shares:
    """Return the shares with the past use of the ledger. Without the ledger nobody has past use, as after its loss."""
    bare = Sharing(sharing.rules, past=past_use(client), total=sharing.total)
    return Shares(bare, mean_time(halves_in))


def past_use(client: redispy.Redis) -> Mapping[str, float]:
    """Return the past use of tenants by the ledger. Without the ledger nobody has past use, as after its loss."""
    try:
        return _past(client)
    except RedisError:
        return {}


def _past(client: redispy.Redis) -> Mapping[str, float]:
    return {snapshot.text(tenant): float(use) for tenant, use in client.hgetall(keys.PAST).items()}
