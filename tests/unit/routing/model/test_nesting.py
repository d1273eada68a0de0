"""Depth of a message is read from its text, without recursion."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from celery_capacity.routing.errors import MessageTooDeep
from celery_capacity.routing.model.nesting import (
    MAX_CANVAS_LEVELS,
    MAX_LEVELS,
    check_body,
    check_headers,
    check_value,
)

EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def nested(levels: int, inside: Any = 0) -> Any:
    """Return a value with so many levels of lists and dicts, by turns."""
    for level in range(levels):
        inside = [inside] if level % 2 else {"a": inside}
    return inside


def body(args: Any = (), kwargs: Any = None, embed: Any = None) -> bytes:
    return json.dumps([args, kwargs or {}, embed or EMBED]).encode()


def depth(value: Any) -> int:
    """Return the depth of a value by recursion."""
    members = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
    return 0 if members is None else 1 + max(map(depth, members), default=0)


@pytest.mark.parametrize("wide", [0, 1, 1000])
def test_fifty_levels_of_arguments_are_allowed_and_one_more_is_not(wide: int) -> None:
    many = [[[0]]] * wide
    check_body(body([nested(50), *many]), "task")
    check_body(body([], {"a": nested(50), "b": many}), "task")
    check_value(([nested(50), *many], {}, EMBED), "task")
    for deep in (body([nested(51), *many]), body([], {"a": nested(51), "b": many})):
        with pytest.raises(MessageTooDeep, match="an argument is nested 51 levels deep, 50 are allowed"):
            check_body(deep, "task")
    with pytest.raises(MessageTooDeep, match="51"):
        check_value(([nested(51)], {}, EMBED), "task")


def test_fifty_levels_of_headers_are_allowed_and_one_more_is_not() -> None:
    check_headers(json.dumps({"headers": {"mine": nested(50)}, "properties": {"a": 1}}).encode())
    with pytest.raises(MessageTooDeep, match="a header is nested 51 levels deep"):
        check_headers(json.dumps({"headers": {"mine": nested(51)}, "properties": {"a": 1}}).encode())


def test_canvas_may_be_deeper_as_each_step_takes_several_levels() -> None:
    check_body(body(embed={**EMBED, "chord": nested(400)}), "task")
    check_body(body([], {"header": nested(400)}), "celery.chord")
    with pytest.raises(MessageTooDeep, match="the canvas"):
        check_body(body(embed={**EMBED, "chord": nested(600)}), "task")


def test_brackets_in_text_are_no_levels() -> None:
    check_body(body(["[" * 1000, "\\", '"[{"' * 100, '\\"' * 10 + "[" * 100]), "task")


@pytest.mark.parametrize("text", [b"[" * 1_000_000, b"[{" * 500_000, b'["' + b"[" * 100, b"]" * 200 + b"[" * 200])
def test_text_that_is_no_json_ends_the_search_for_its_depth(text: bytes) -> None:
    # Such a text is refused as too deep, or where it is read.
    try:
        check_body(text, "task")
    except MessageTooDeep as error:
        assert "levels deep" in str(error)


def test_a_value_that_holds_itself_is_too_deep() -> None:
    endless: list[Any] = []
    endless += [endless, endless]
    with pytest.raises(MessageTooDeep):
        check_value(([endless], {}, EMBED), "task")


_VALUES = st.recursive(
    st.none() | st.text() | st.floats(),
    lambda inside: st.lists(inside, max_size=5) | st.dictionaries(st.text(), inside, max_size=5),
    max_leaves=60,
)


@given(value=_VALUES, more=st.integers(0, 60))
@example(value=[], more=MAX_LEVELS)
@example(value={}, more=MAX_LEVELS - 1)
def test_the_depth_of_the_text_is_that_of_the_value(value: Any, more: int) -> None:
    levels = depth(deep := nested(more, value))
    text = body([deep])
    if levels <= MAX_LEVELS:
        check_body(text, "task")
        check_value(([deep], {}, EMBED), "task")
    else:
        with pytest.raises(MessageTooDeep, match=f"{levels} levels deep, {MAX_LEVELS} are allowed"):
            check_body(text, "task")
        with pytest.raises(MessageTooDeep):
            check_value(([deep], {}, EMBED), "task")


def test_canvas_that_is_too_deep_is_refused_with_its_own_limit() -> None:
    deep = nested(MAX_CANVAS_LEVELS + 1, None)
    with pytest.raises(MessageTooDeep, match=f"{MAX_CANVAS_LEVELS} are allowed"):
        check_body(body([deep]), "celery.chain")
    with pytest.raises(MessageTooDeep, match=f"{MAX_CANVAS_LEVELS} are allowed"):
        check_value(([deep], {}, EMBED), "celery.chain")
