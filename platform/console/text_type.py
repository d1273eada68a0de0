"""Text as people type it, which the stores must be able to hold."""

from __future__ import annotations

from typing import Any

import click


class Text(click.ParamType):  # type: ignore[type-arg]
    """Type of an option that takes text. It refuses bytes that are no UTF-8, which Python reads as lone surrogates."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail(f"{text!r} is no text in UTF-8. Type it in a terminal that uses UTF-8.", param, ctx)
        return text
