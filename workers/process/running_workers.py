"""The workers that run in this process, oldest first. As a rule there is one; tests start several in threads
(`celery.contrib.testing`), also of one app.

What belongs to a worker hangs on the worker. Only who knows no more than the process, or the app, looks here.
"""

from __future__ import annotations

from typing import Any, Final

#: Each a `workers.execute.runtime.Runtime`, which is made of modules that look here.
_running: Final[list[Any]] = []


def begin(runtime: Any) -> None:
    """Its worker starts."""
    _running.append(runtime)


def end(runtime: Any) -> None:
    """Its worker has left. Does nothing where it never began."""
    if runtime in _running:
        _running.remove(runtime)


def running() -> list[Any]:
    """Those whose workers run."""
    return list(_running)


def newest(app: Any) -> Any | None:
    """The last that began among those of the app; None where the app has no worker here."""
    return next((runtime for runtime in reversed(running()) if runtime.app is app), None)
