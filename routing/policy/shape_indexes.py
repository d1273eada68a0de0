"""Indexes of waiting shapes: where a shape stands beside the index of all shapes, and what it asks for."""

from __future__ import annotations

from celery_capacity.routing.model.amounts import ALONE, DEFAULT_QUEUE, LABEL, has_index, is_label
from celery_capacity.routing.model.request import alternatives_of, split_shape
from celery_capacity.routing.policy.tenants import DEFAULT_TENANT, TENANT_SIGN, tenant_of


def waits_beside(shape: str) -> str:
    """Return the index of waiting shapes in which a shape stands beside the index of all shapes.

    That is the index of its tenant, where it names one. For a labelled queue that is the index of the queue. In the
    default queue it is the index of the first requested resource that not every worker has; without such a resource,
    the index of the default queue. A shape with alternatives stands there too, since any worker may have one of them.
    """
    if (tenant := tenant_of(shape)) != DEFAULT_TENANT:
        return TENANT_SIGN + tenant
    parts = split_shape(shape)[0].split(",")
    names = [name for name in (part.partition("=")[0] for part in parts) if has_index(name)]
    if ",|" in shape:
        names = [name for name in names if is_label(name)]
    return next((name for name in names if is_label(name)), next(iter(names), LABEL + DEFAULT_QUEUE))


def asked_score(shape: str, name: str) -> int:
    """Return the score of a waiting shape in the index of what shapes ask of a resource: -1 for one that runs alone.

    Of several alternatives the one that asks for the least counts.
    """
    requests = alternatives_of(shape)
    return -1 if requests[0].get(ALONE) else min(request.get(name) for request in requests)
