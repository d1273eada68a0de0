"""Description of a setting: its variable, its default, its unit, its meaning and its parser, kept with the field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple

from celery_capacity.routing.config import setting_values


class Meaning(NamedTuple):
    """Metadata of a field: variable, default as the docs write it, unit, what it does, and its parser."""

    env: str
    shown: str
    unit: str
    text: str
    parse: Callable[[str, str], Any]


def setting(
    env: str,
    text: str,
    parse: Callable[[str, str], Any] = setting_values.plain_text,
    default: Any = None,
    unit: str = "",
    shown: str = "",
) -> Any:
    written = shown or ("" if default is None else str(default))
    meaning = Meaning(env, written, unit, text, parse)
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"setting": meaning})
    return field(default=default, metadata={"setting": meaning})


def duration(env: str, default: float, text: str) -> Any:
    return setting(env, text, setting_values.seconds, default, "seconds", f"{default:.10g}")
