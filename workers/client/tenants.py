"""Rules of tenants: who makes one, removes one, and what each tenant uses now.

A rule is durable in Postgres before anything else, as the other orders of operators are (`workers.client.controls`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from celery_capacity.routing.database import tenants as stored
from celery_capacity.routing.database.postgres_errors import translated
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.identifiers import check_tenant
from celery_capacity.routing.policy.tenants import DEFAULT_TENANT, MAX_WEIGHT, PARTS, Rule, Sharing
from celery_capacity.routing.store import controls
from celery_capacity.workers.client.controls import apply, operator
from celery_capacity.workers.process.stores import Stores, transactions

#: Waiting jobs that a limit may allow.
MAX_WAITING: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TenantLine:
    """A tenant: its rule, the amounts that its jobs hold by Postgres, and the number of its waiting jobs.

    `share`: its dominant share of the workers, from 0 to 1. `ruled`: False where it has no rule of its own.
    """

    name: str
    rule: Rule
    used: dict[str, int]
    share: float
    waiting: int
    ruled: bool

    def to_json(self) -> dict[str, Any]:
        nominal, quota, used = map(controls.people_of, (self.rule.nominal, self.rule.quota, self.used))
        return {
            "name": self.name,
            "weight": self.rule.weight,
            "nominal": nominal,
            "quota": quota,
            "max_waiting": self.rule.max_waiting,
            "used": used,
            "share": round(self.share, 4),
            "waiting": self.waiting,
            "ruled": self.ruled,
        }


@dataclass(frozen=True, slots=True)
class TenantOrder:
    """A rule that was made or removed. `before`: True if there was one. `applied`: False: the ledger has it later."""

    line: TenantLine
    before: bool
    applied: bool

    def to_json(self) -> dict[str, Any]:
        return {**self.line.to_json(), "before": self.before, "applied": self.applied}


def set_tenant(stores: Stores, name: str, changes: dict[str, Any], *, by: str | None = None) -> TenantOrder:
    """Make a rule of a tenant, or change these fields of it. Raises `InvalidRequest`, `StoreUnavailable`."""
    check_tenant(name)
    with translated("no rule was made: "), transactions(stores.engine).begin() as connection:
        controls.lock(connection)
        before = stored.tenant_rules(connection).get(name)
        existing = before or Rule()
        fields = {key: getattr(existing, key) for key in ("weight", "nominal", "quota", "max_waiting")}
        controls.set_tenant(connection, name, check_rule(Rule(**{**fields, **changes}), name), operator(by))
    return _order(stores, name, before is not None)


def remove_tenant(stores: Stores, name: str, *, by: str | None = None) -> TenantOrder:
    """Remove the rule of a tenant. Its jobs go on with the defaults. Raises `StoreUnavailable`."""
    check_tenant(name)
    with translated("no rule was removed: "), transactions(stores.engine).begin() as connection:
        controls.lock(connection)
        before = controls.remove_tenant(connection, name, operator(by))
    return _order(stores, name, before)


def check_rule(rule: Rule, name: str) -> Rule:
    """Return a rule whose numbers are in range. Raises `InvalidRequest`."""
    if not 1 <= rule.weight <= MAX_WEIGHT:
        advice = f"It must be from 1 to {MAX_WEIGHT}."
        raise InvalidRequest(f"weight {rule.weight} is not valid", value=rule.weight, advice=advice)
    if not 0 <= rule.max_waiting <= MAX_WAITING:
        advice = f"It must be from 0, for no limit, to {MAX_WAITING}."
        raise InvalidRequest(f"max_waiting {rule.max_waiting} is not valid", value=rule.max_waiting, advice=advice)
    if rule.max_waiting and name == DEFAULT_TENANT:
        advice = "PLATFORM_MAX_BACKLOG limits the waiting jobs of all tenants."
        message = f"max_waiting of tenant {DEFAULT_TENANT} is not supported"
        raise InvalidRequest(message, value=rule.max_waiting, advice=advice)
    for resource, amount in rule.nominal.items():
        if amount > rule.quota.get(resource, amount):
            advice = "A nominal share must not exceed the quota: the tenant could never use it."
            raise InvalidRequest(f"the nominal share of {resource} exceeds the quota", value=amount, advice=advice)
    return rule


def tenants(stores: Stores) -> list[TenantLine]:
    """Return all tenants with a rule, or with jobs that wait or run, by name. Raises `StoreUnavailable`."""
    with translated(), stores.engine.connect() as connection:
        sharing, waiting = stored.sharing(connection), stored.waiting_by_tenant(connection)
    names = {DEFAULT_TENANT, *sharing.rules, *sharing.used, *waiting}
    return [_line(name, sharing, waiting.get(name, 0)) for name in sorted(names)]


def _line(name: str, sharing: Sharing, waiting: int) -> TenantLine:
    used = {resource: amount for resource, amount in sharing.used.get(name, {}).items() if amount}
    rule = sharing.rule(name)
    return TenantLine(name, rule, used, sharing.level(name) * rule.weight / PARTS, waiting, name in sharing.rules)


def _order(stores: Stores, name: str, before: bool) -> TenantOrder:
    applied = apply(stores)
    with translated(), stores.engine.connect() as connection:
        sharing, waiting = stored.sharing(connection), stored.waiting_by_tenant(connection)
    return TenantOrder(_line(name, sharing, waiting.get(name, 0)), before, applied)
