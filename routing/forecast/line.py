"""Place of a waiting job in the line of all tenants: which tenant comes first, and how many jobs start before it.

Jobs that nothing but room holds back start in the order of priority, of the turn of their tenant, and of submission.
Each start is use of its tenant, so turns go round. A quota is judged by what runs now: running jobs end meanwhile.

Jobs that come earlier by submission are counts by shape, however many there are. Of the other tenants the first waiting
jobs of the same priority are read. Behind these the order of submission decides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

from sqlalchemy import Connection, text

from celery_capacity.routing.database import tenants
from celery_capacity.routing.model.request import Request, alternatives_of, filed_shape
from celery_capacity.routing.policy.tenants import DEFAULT_TENANT, Sharing, tenant_of, tenant_term

#: Jobs of other tenants that are read, the first ones of each; and tenants.
MAX_READ: Final = 2000
MAX_TENANTS: Final = 500
#: Waiting jobs among which those of the default tenant are looked for: no index has them alone.
LOOKED_AT: Final = 20_000

_WAITS: Final = "state IN ('accepted', 'waiting') AND (- priority) = :level"
_OF_TENANTS: Final = text(f"""
SELECT w.* FROM unnest(CAST(:tenants AS text[])) AS t (tenant) CROSS JOIN LATERAL (
  SELECT name, shape, seq FROM jobs WHERE {_WAITS} AND {tenants.NAMES_TENANT} AND {tenants.OF_TENANT} = t.tenant
  ORDER BY (- priority), seq LIMIT :most) AS w
""")
_OF_DEFAULT: Final = text(f"""
SELECT * FROM (SELECT name, shape, seq FROM jobs WHERE {_WAITS} ORDER BY (- priority), seq LIMIT :looked_at) AS w
WHERE NOT ({tenants.NAMES_TENANT}) ORDER BY seq LIMIT :most
""")


class Rival(NamedTuple):
    """A waiting job of another tenant, of the same priority."""

    filed: str
    seq: int


class Rivals(NamedTuple):
    """The first waiting jobs of the other tenants, in order. `most`: as many were read of each at the most."""

    by_tenant: Mapping[str, Sequence[Rival]]
    most: int

    @property
    def shapes(self) -> set[str]:
        """Return the filed shapes of these jobs."""
        return {rival.filed for rows in self.by_tenant.values() for rival in rows}


def read_rivals(connection: Connection, tenant: str, priority: int) -> Rivals:
    """Read the first waiting jobs of the tenants other than this one, of one priority."""
    names = [name for name in tenants.waiting_tenants(connection) if name != tenant][:MAX_TENANTS]
    most = max(1, MAX_READ // max(1, len(names)))
    values = {"level": -priority, "most": most}
    rows = list(connection.execute(_OF_TENANTS, {**values, "tenants": [it for it in names if it != DEFAULT_TENANT]}))
    if DEFAULT_TENANT in names:
        rows += connection.execute(_OF_DEFAULT, {**values, "looked_at": LOOKED_AT})
    by_tenant: dict[str, list[Rival]] = defaultdict(list)
    for name, shape, seq in rows:
        by_tenant[tenant_of(shape)].append(Rival(filed_shape(shape, name), seq))
    return Rivals(by_tenant, most)


class Line:
    """The line of all tenants for a job. `startable`: the filed shapes whose jobs wait for nothing but room."""

    def __init__(self, rivals: Rivals, sharing: Sharing, startable: Collection[str]) -> None:
        self._sharing = sharing
        self._most = rivals.most
        self._rivals = {
            tenant: [rival for rival in rows if rival.filed in startable] for tenant, rows in rivals.by_tenant.items()
        }
        self._cut = {tenant for tenant, rows in rivals.by_tenant.items() if len(rows) == rivals.most}

    def first_tenant(self, filed: str) -> str | None:
        """Return the tenant whose turn is before that of a job by the shares of now; None for none."""
        turns = [(self._sharing.turn(tenant_term(tenant)), tenant) for tenant, rows in self._rivals.items() if rows]
        turn, tenant = min(turns, default=(self._sharing.turn(filed), ""))
        return tenant if turn < self._sharing.turn(filed) else None

    def count_before(self, filed: str, seq: int, higher: Mapping[str, int], earlier: Mapping[str, int]) -> int:
        """Return how many jobs start before a job.

        `higher`: the number of jobs of higher priorities, by filed shape. `earlier`: of those of its own priority that
        were submitted before it. Both have only jobs that wait for nothing but room.
        """
        sharing = self._sharing
        for shape, number in higher.items():
            sharing = sharing.holding(shape, _request(shape), number)
        own_jobs = {shape: number for shape, number in earlier.items() if tenant_of(shape) == tenant_of(filed)}
        of_others: dict[str, int] = defaultdict(int)
        for shape, number in earlier.items():
            of_others[tenant_of(shape)] += 0 if shape in own_jobs else number
        at_last = sharing
        for shape, number in own_jobs.items():
            at_last = at_last.holding(shape, _request(shape), number)
        last = (*at_last.turn(filed), seq)
        before = sum(higher.values()) + sum(own_jobs.values())
        for tenant in {*of_others, *self._rivals}:
            before += self._count(tenant, sharing, last, of_others.get(tenant, 0))
        return before

    def _count(self, tenant: str, sharing: Sharing, last: tuple[bool, int, int], submitted_before: int) -> int:
        """Return how many jobs of a tenant start before the place `last`."""
        rows = self._rivals.get(tenant, [])
        for number, rival in enumerate(rows):
            if (*sharing.turn(rival.filed), rival.seq) > last:
                return number
            sharing = sharing.holding(rival.filed, _request(rival.filed))
        # Nobody has read the jobs behind these.
        return max(len(rows), submitted_before) if tenant in self._cut else len(rows)


def _request(filed: str) -> Request:
    return alternatives_of(filed)[0]
