"""Tables that fit the screen: names are shortened, and at last some columns are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from rich.cells import cell_len, set_cell_size

#: Columns that may be narrower than their content on a terminal, with the fewest characters of each.
ELASTIC: Final = {"task": 12, "worker": 8, "queue": 6, "error": 12}
#: Columns that are left out on a narrow terminal, the first of them first.
DISPENSABLE: Final = ("request", "error", "queue", "worker")
#: Characters of an error or a name in a list.
CUT: Final = 60


def fit(
    columns: Mapping[str, list[str]],
    screen: int,
    elastic: Mapping[str, int] = ELASTIC,
    dispensable: Sequence[str] = DISPENSABLE,
) -> dict[str, list[str]]:
    """Return the columns, narrowed until a row fits the screen; at last some columns are left out.

    `elastic` and `dispensable`: as `ELASTIC` and `DISPENSABLE`, of another table than that of jobs.
    """
    kept = dict(columns)
    for name in dispensable:
        # The request goes before a name is shortened, the others only where the shortest form does not fit either.
        least = {key: _width(kept, key) for key in kept}
        if name != "request":
            least = {key: min(width, elastic.get(key, width)) for key, width in least.items()}
        if sum(least.values()) + 2 * (len(least) - 1) <= screen:
            continue
        kept.pop(name, None)
    widths = {name: _width(kept, name) for name in kept}
    excess = sum(widths.values()) + 2 * (len(widths) - 1) - screen
    while excess > 0:
        wide = [name for name, least in elastic.items() if widths.get(name, 0) > least]
        if not wide:
            break
        name = max(wide, key=lambda key: widths[key])
        widths[name] -= 1
        excess -= 1
    return {
        name: [shorten_end(cell, widths[name]) if name == "error" else shorten(cell, widths[name]) for cell in cells]
        for name, cells in kept.items()
    }


def _width(columns: Mapping[str, list[str]], name: str) -> int:
    return max(len(name), *map(cell_len, columns[name]))


def shorten(text: str, width: int) -> str:
    """Shorten a name in its middle to so many columns of the screen: its package and its name are at its ends."""
    if cell_len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3
    return f"{set_cell_size(text, width - 1 - tail)}…{set_cell_size(text[::-1], tail)[::-1]}"


def shorten_end(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def cut(text: str) -> str:
    """Return the beginning of a text on one line, for a list."""
    return line if len(line := " ".join(text.split())) <= CUT else line[: CUT - 1] + "…"
