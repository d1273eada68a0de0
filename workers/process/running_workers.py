"""Workers that run in this process, oldest first.

As a rule there is one worker. Tests start several in threads (`celery.contrib.testing`), also of one app.

The state of a worker hangs on the worker. Only code that knows no more than the process, or the app, looks here.
"""

from __future__ import annotations

from typing import Any, Final

#: Each item is a `workers.execute.runtime.Runtime`. That module is made of modules that look here.
_running: Final[list[Any]] = []


def begin(runtime: Any) -> None:
    """Add a runtime whose worker starts."""
    _running.append(runtime)


def end(runtime: Any) -> None:
    """Remove a runtime whose worker has left. Does nothing where it never began."""
    if runtime in _running:
        _running.remove(runtime)


def running() -> list[Any]:
    """Return the runtimes whose workers run."""
    return list(_running)


def newest(app: Any) -> Any | None:
    """Return the runtime of the app that began last, None where the app has no worker here."""
    return next((runtime for runtime in reversed(running()) if runtime.app is app), None)
