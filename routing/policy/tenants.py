"""Tenants: the share of the cluster that each has, and whose job starts next.

Plain functions of plain values, as in `placement`. The rules, with their sources:

- **Dominant resource fairness** (Ghodsi et al., NSDI 2011). The share of a tenant is the largest part of any resource
  that its jobs hold, of the capacity of all workers. Divided by the tenant's weight, it is the tenant's *level*.
- **Past use** (the half-life of Slurm's fair share). An ended job adds its own dominant share times its run time. The
  sum halves in each half-life. Divided by the mean time for which such an addition counts, it has the unit of a share.
  So a tenant that used much lately comes later, and nobody saves up use for ever.
- **Turns.** Jobs of a higher priority come first, whoever submits them. Of one priority, the first job of the tenant
  with the lowest level starts next. Jobs of one tenant keep the order of the backlog.
- **Nominal share.** While a tenant holds less than its nominal amount of each resource that has one, its jobs come
  before those of tenants that hold more than theirs or have none. Nothing is taken from a running job: others borrow
  what is idle, and give it back as their jobs end.
- **Quota.** No job starts that would make its tenant hold more than its quota of a resource. Others pass it.
- A job without a tenant belongs to `default`, which has a level, a weight and limits like all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from celery_capacity.routing.model.amounts import ALONE, is_label
from celery_capacity.routing.model.request import Request, term_of

if TYPE_CHECKING:
    from celery_capacity.routing.policy.placement import Waiting

#: Tenant of the jobs that name none. Their shapes have no term.
DEFAULT_TENANT: Final = "default"
#: Sign of a tenant's term in a shape.
TENANT_SIGN: Final = "$"
#: Beginning of a tenant's term, which no other part of a shape has.
NAMED_TENANT: Final = f",{TENANT_SIGN}"
#: Largest weight.
MAX_WEIGHT: Final = 1_000_000
#: Levels are compared in parts of a million, so that rounding decides no turn.
PARTS: Final = 1_000_000


def tenant_term(tenant: str) -> str:
    """Return a tenant's term with its comma, as it stands in shapes; "" for the default tenant."""
    return "" if tenant == DEFAULT_TENANT else f",{TENANT_SIGN}{tenant}"


def tenant_of(shape: str) -> str:
    """Return the tenant of the jobs that wait under a shape."""
    return term_of(shape, TENANT_SIGN) or DEFAULT_TENANT


def mean_time(halves_in: float) -> float:
    """Return the mean time (ms) for which past use counts that halves in `halves_in` seconds; 0 where none counts."""
    return halves_in * 1000 / math.log(2)


def counted_amounts(request: Request) -> dict[str, int]:
    """Return the amounts of a request that count as use. Queues, and being alone, are no shares of a resource."""
    return {name: amount for name, amount in request.amounts if name != ALONE and not is_label(name)}


@dataclass(frozen=True)
class Rule:
    """Agreement with one tenant. `nominal`, `quota`: amounts by resource. `max_waiting`: 0 for no limit."""

    weight: int = 1
    nominal: Mapping[str, int] = field(default_factory=dict)
    quota: Mapping[str, int] = field(default_factory=dict)
    max_waiting: int = 0

    @classmethod
    def from_text(cls, text: str) -> Rule:
        """Return a rule from its text in the ledger, which has no limit on waiting jobs."""
        weight, nominal, quota = text.split(";")
        return cls(int(weight), _amounts(nominal), _amounts(quota))

    @property
    def text(self) -> str:
        """Return the rule as the ledger has it: its weight, nominal share and quota, with semicolons between."""
        return f"{self.weight};{_text(self.nominal)};{_text(self.quota)}"


def _text(amounts: Mapping[str, int]) -> str:
    return ",".join(f"{name}={amount}" for name, amount in sorted(amounts.items()))


def _amounts(text: str) -> dict[str, int]:
    pairs = (part.partition("=") for part in text.split(",") if part)
    return {name: int(amount) for name, _, amount in pairs}


#: Rule of a tenant for which nobody has made one.
PLAIN: Final = Rule()


@dataclass(frozen=True)
class Sharing:
    """All that decides whose turn it is. `used`: amounts that the jobs of each tenant hold, by resource.

    `past`: decayed past use of each tenant, as a share. `total`: capacity of all workers, by resource.
    """

    rules: Mapping[str, Rule] = field(default_factory=dict)
    used: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    past: Mapping[str, float] = field(default_factory=dict)
    total: Mapping[str, int] = field(default_factory=dict)

    def rule(self, tenant: str) -> Rule:
        """Return the rule of a tenant."""
        return self.rules.get(tenant, PLAIN)

    def share(self, amounts: Mapping[str, int]) -> float:
        """Return the dominant share of these amounts: the largest part of any resource that the workers have."""
        return max((amount / self.total[name] for name, amount in amounts.items() if self.total.get(name)), default=0.0)

    def level(self, tenant: str) -> int:
        """Return what a tenant uses beside its weight, in parts of a million: the lowest comes first."""
        use = self.share(self.used.get(tenant, {})) + self.past.get(tenant, 0.0)
        return math.floor(use / self.rule(tenant).weight * PARTS + 0.5)

    def borrows(self, tenant: str) -> bool:
        """Return True unless a tenant holds less than its nominal share of each resource that has one."""
        nominal, used = self.rule(tenant).nominal, self.used.get(tenant, {})
        return not nominal or any(used.get(name, 0) >= amount for name, amount in nominal.items())

    def exceeded(self, tenant: str, request: Request) -> str:
        """Return the first resource, by name, of which a start would exceed the tenant's quota; "" for none."""
        used, asked = self.used.get(tenant, {}), counted_amounts(request)
        quota = sorted(self.rule(tenant).quota.items())
        return next((n for n, most in quota if asked.get(n, 0) and used.get(n, 0) + asked[n] > most), "")

    def may_start(self, waiting: Waiting) -> bool:
        """Return True if the quota of its tenant lets a job start, by one of its alternatives."""
        tenant = tenant_of(waiting.terms)
        return not all(self.exceeded(tenant, request) for request in waiting.alternatives)

    def admissible(self, backlog: Iterable[Waiting]) -> Iterator[Waiting]:
        """Yield the jobs that no quota holds back."""
        return (waiting for waiting in backlog if self.may_start(waiting))

    def turn(self, shape: str) -> tuple[bool, int]:
        """Return the turn of a shape's tenant among jobs of one priority: the least comes first."""
        tenant = tenant_of(shape)
        return self.borrows(tenant), self.level(tenant)

    def holding(self, shape: str, request: Request, number: int = 1) -> Sharing:
        """Return the shares after so many jobs of this shape started."""
        tenant = tenant_of(shape)
        held = dict(self.used.get(tenant, {}))
        for name, amount in counted_amounts(request).items():
            held[name] = held.get(name, 0) + number * amount
        return replace(self, used={**self.used, tenant: held})

    def releasing(self, shape: str, request: Request, run_ms: float, time_ms: float) -> Sharing:
        """Return the shares after a job of this shape ended. `time_ms`: as `mean_time` returns it."""
        tenant, amounts = tenant_of(shape), counted_amounts(request)
        held = {name: amount - amounts.get(name, 0) for name, amount in self.used.get(tenant, {}).items()}
        past = self.past.get(tenant, 0.0) + (self.share(amounts) * run_ms / time_ms if time_ms else 0.0)
        return replace(self, used={**self.used, tenant: held}, past={**self.past, tenant: past})

    def later(self, elapsed_ms: float, time_ms: float) -> Sharing:
        """Return the shares after some time, in which past use decayed."""
        left = math.exp(-elapsed_ms / time_ms) if time_ms else 0.0
        return replace(self, past={tenant: use * left for tenant, use in self.past.items()})


def within_quota(waiting: Waiting, sharing: Sharing | None) -> Iterator[Waiting]:
    """Yield a job with each of its alternatives that the quota of its tenant allows, in order."""
    for entry in waiting.choices:
        if sharing is None or not sharing.exceeded(tenant_of(waiting.terms), entry.request):
            yield entry
