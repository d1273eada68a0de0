"""Tables as HTML for notebooks. All texts are escaped: names and errors are text of any submitter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, Final

_LEFT: Final = 'style="text-align:left"'


def facts(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    """Return a table of two columns below a title. Rows without a value are left out."""
    lines = [
        f"<tr><th {_LEFT}>{escape(name)}</th><td {_LEFT}>{escape(str(value))}</td></tr>"
        for name, value in rows
        if value not in (None, "")
    ]
    return _table(title, "", lines)


def listing(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table of rows below a header."""
    head = "".join(f"<th {_LEFT}>{escape(name)}</th>" for name in header)
    lines = ["<tr>" + "".join(f"<td {_LEFT}>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    return _table(title, f"<thead><tr>{head}</tr></thead>", lines)


def sentence(title: str, text: str) -> str:
    """Return a sentence below a title, such as an error."""
    return f"<p><code>{escape(title)}</code>: {escape(text)}</p>"


def _table(title: str, head: str, lines: Sequence[str]) -> str:
    return f"<table><caption><code>{escape(title)}</code></caption>{head}<tbody>{''.join(lines)}</tbody></table>"
