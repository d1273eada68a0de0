"""Result of a group whose `get` can show a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.result import GroupResult

from celery_capacity.workers.display.progress_bar import ProgressBar


class PlatformGroupResult(GroupResult):
    """Result of a group. `get(progress=True)` draws a bar while it waits, in a terminal or a notebook."""

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float = 0.5,
        callback: Callable[[str, Any], object] | None = None,
        *arguments: Any,
        progress: bool = False,
        **more: Any,
    ) -> Any:
        """Return the results of the jobs, in their order, as Celery does; with `progress=True` draw a bar meanwhile."""
        if not progress:
            return super().get(timeout, propagate, interval, callback, *arguments, **more)
        places = {result.id: number for number, result in enumerate(self.results)}
        values: list[Any] = [None] * len(self.results)
        with ProgressBar("jobs", len(self.results)) as bar:

            def take(job: str, value: Any) -> None:
                values[places[job]] = value
                if callback is not None:
                    callback(job, value)
                bar.advance()

            without_values = super().get(timeout, propagate, interval, take, *arguments, **more)
        return values if callback is None else without_values
