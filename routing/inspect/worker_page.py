"""A page of the workers of a large cluster, in the order of their names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Page:
    """The workers to show, by name: at most `limit` of them (None: all), behind the name `after`."""

    limit: int | None = None
    after: str = ""

    def of(self, names: Iterable[str]) -> tuple[list[str], str | None]:
        """Return the names on the page, and the last of them if more names follow."""
        behind = sorted(name for name in names if name > self.after)
        shown = behind if self.limit is None else behind[: self.limit]
        return shown, shown[-1] if shown and len(shown) < len(behind) else None


#: The page with all workers.
WHOLE: Final = Page()
