"""Conditions that choose jobs by what a person types, the same for a list of jobs and for an action on them."""

from __future__ import annotations

import json
import re
from typing import Any

from sqlalchemy import ColumnElement, func, literal, or_


def like_pattern(pattern: str) -> str:
    r"""Return the operand of LIKE, with `\` as its escape, for a pattern in which `*` stands for any characters."""
    return "%".join(re.sub(r"([\\%_])", r"\\\1", part) for part in pattern.split("*"))


def matches(column: ColumnElement[Any], pattern: str) -> ColumnElement[bool]:
    """Return the condition that a column is like a pattern, in which `*` stands for any characters."""
    if "*" not in pattern:
        return column == pattern
    return column.like(like_pattern(pattern), escape="\\")


def in_group(columns: Any, group: str, *, readable: bool = True) -> ColumnElement[bool]:
    """Return the condition that a job is in a group or a chord, or in the workflow whose first task has this id.

    `columns`: those of jobs, with `message` if it is `readable`. Messages alone name groups. A message is compact JSON
    whose body is base64, so no argument of a task looks like a header.
    """
    of_root: ColumnElement[bool] = columns.root_id == group
    if not readable:
        return of_root
    return or_(of_root, func.pg_catalog.position(columns.message, literal(group_header(group))) > 0)


def group_header(group: str) -> bytes:
    """Return the header that names a group, as it stands in a message."""
    return f'"group":{json.dumps(group)}'.encode()
