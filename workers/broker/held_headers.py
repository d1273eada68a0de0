"""Headers of an arrived message whose attempt holds one of several alternatives."""

from __future__ import annotations

from typing import Any

from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.model.message import HEADER, parse_tag
from celery_capacity.routing.model.request import holding


def held_headers(headers: Any, delivery_tag: object) -> Any:
    """Return the headers of a message with the alternative that the tag of its attempt names.

    So the worker counts that one, and the task and its retries see it. An invalid shape stays as it is: it is refused
    where it is read.
    """
    tag, carried = parse_tag(delivery_tag), headers.get(HEADER) if isinstance(headers, dict) else None
    if tag is None or not tag.alternative or not isinstance(carried, dict):
        return headers
    try:
        return {**headers, HEADER: {**carried, "shape": holding(str(carried.get("shape")), tag.alternative)}}
    except PlatformError:
        return headers
