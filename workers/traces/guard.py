"""Guard around the calls of OpenTelemetry: an operator's sampler, processor or exporter may fail, a job may not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, TypeVar

from billiard.exceptions import SoftTimeLimitExceeded

Value = TypeVar("Value")

logger = logging.getLogger(__name__)

#: Names of the calls whose failure is in the log. Each failure of a worker that runs for days would fill it.
_logged: Final = set[str]()


def guarded(call: Callable[..., Value], *args: Any) -> Value | None:
    """Return the value of a call. Return None if it raises an exception: the first one of a call is logged.

    Raises `SoftTimeLimitExceeded`: it comes between any two steps of a body's process, and is of the body.
    """
    try:
        return call(*args)
    except SoftTimeLimitExceeded:
        raise
    except Exception:
        name = getattr(call, "__qualname__", repr(call))
        if name not in _logged:
            _logged.add(name)
            logger.warning("no span: %s of OpenTelemetry failed; jobs go on without it", name, exc_info=True)
        return None
