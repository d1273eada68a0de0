"""Tenants by Postgres: their rules, what their jobs hold, and which of them wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, text

from celery_capacity.routing.model.amounts import CPUS, from_people
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.policy.tenants import DEFAULT_TENANT, Rule, Sharing


def tenant_rules(connection: Connection) -> dict[str, Rule]:
    """Return the rules of tenants, by name."""
    rows = connection.execute(text("SELECT name, weight, nominal, quota, max_waiting FROM tenants ORDER BY name"))
    return {
        name: Rule(weight, from_people(nominal), from_people(quota), waiting)
        for name, weight, nominal, quota, waiting in rows
    }


#: Tenant of a row of `jobs` that names one, and the condition that it does. The index jobs_tenants has both.
OF_TENANT: Final = r"substring(shape FROM ',\$([^,]+)')"
NAMES_TENANT: Final = "shape LIKE '%,$%'"
_USE: Final = text("SELECT shape, count(*) FROM jobs WHERE state IN ('admitted', 'running') GROUP BY shape")
_WAITING_OF: Final = text(
    f"SELECT coalesce({OF_TENANT}, 'default'), count(*) FROM jobs WHERE state IN ('accepted', 'waiting') GROUP BY 1"
)
_TOTALS: Final = text("""
SELECT key, sum(value::text::numeric)::float FROM workers, jsonb_each(capacity)
WHERE status = 'ready' AND jsonb_typeof(value) = 'number' GROUP BY key
""")


def capacity(connection: Connection) -> dict[str, int]:
    """Return the capacity of all workers, by resource."""
    return {name: round(amount * (1000 if name == CPUS else 1)) for name, amount in connection.execute(_TOTALS)}


def sharing(connection: Connection) -> Sharing:
    """Return the shares of tenants by Postgres: their rules, what their jobs hold, and the capacity of all workers."""
    use = Sharing(tenant_rules(connection), total=capacity(connection))
    for shape, number in connection.execute(_USE):
        use = use.holding(shape, Request.from_shape(shape), number)
    return use


_IN_USE: Final = text(f"""
SELECT EXISTS (SELECT FROM tenants)
  OR EXISTS (SELECT FROM jobs WHERE state IN ('accepted', 'waiting') AND {NAMES_TENANT})
""")


def are_in_use(connection: Connection) -> bool:
    """Return True if a tenant has a rule, or a waiting job names one."""
    return bool(connection.execute(_IN_USE).scalar_one())


def sharing_in_use(connection: Connection) -> Sharing | None:
    """Return the shares of tenants by Postgres; None where no tenant has a rule, and no waiting job names one."""
    return sharing(connection) if are_in_use(connection) else None


_QUOTA_OF: Final = text(f"""
SELECT EXISTS (SELECT FROM tenants WHERE quota <> '{{}}' AND name IN (
  SELECT coalesce({OF_TENANT}, 'default') FROM jobs WHERE id = ANY(:jobs)))
""")


def have_quota(connection: Connection, jobs: Sequence[str]) -> bool:
    """Return True if the tenant of one of these jobs has a quota, so that an end may start a job on any worker."""
    return bool(connection.execute(_QUOTA_OF, {"jobs": list(jobs)}).scalar_one())


_WAITING_TENANTS: Final = text(f"""
WITH RECURSIVE t (name) AS (
  (SELECT {OF_TENANT} FROM jobs WHERE state IN ('accepted', 'waiting') AND {NAMES_TENANT} ORDER BY 1 LIMIT 1)
  UNION ALL
  SELECT (SELECT {OF_TENANT} FROM jobs WHERE state IN ('accepted', 'waiting') AND {NAMES_TENANT}
          AND {OF_TENANT} > t.name ORDER BY 1 LIMIT 1) FROM t WHERE t.name IS NOT NULL
)
SELECT name FROM t WHERE name IS NOT NULL
""")


def waiting_tenants(connection: Connection) -> list[str]:
    """Return the tenants of which jobs wait, and the default tenant, in as many steps in an index."""
    return [DEFAULT_TENANT, *connection.execute(_WAITING_TENANTS).scalars()]


def waiting_by_tenant(connection: Connection) -> dict[str, int]:
    """Return the number of jobs that wait, by tenant."""
    return {row[0]: row[1] for row in connection.execute(_WAITING_OF)}


def max_waiting(connection: Connection, tenant: str) -> int:
    """Return the number of jobs of a tenant that may wait, 0 for any number."""
    statement = text("SELECT max_waiting FROM tenants WHERE name = :tenant")
    return connection.execute(statement, {"tenant": tenant}).scalar_one_or_none() or 0


_WAITING_UP_TO: Final = text(f"""
SELECT count(*) FROM (SELECT FROM jobs WHERE state IN ('accepted', 'waiting') AND {NAMES_TENANT}
  AND {OF_TENANT} = :tenant LIMIT :most) AS waiting
""")


def waiting_of(connection: Connection, tenant: str, most: int) -> int:
    """Return the number of waiting jobs of a tenant other than the default one, or `most` where more wait."""
    return int(connection.execute(_WAITING_UP_TO, {"tenant": tenant, "most": most}).scalar_one())
