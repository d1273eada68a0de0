"""Tokens of attempts: read, written and compared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.model.token import Token

TOKENS = st.builds(Token, st.integers(0, 2**62), st.integers(0, 2**31))


@given(TOKENS, TOKENS)
def test_token_is_read_as_it_is_written_and_newer_is_larger(one: Token, other: Token) -> None:
    assert Token.parse(str(one)) == one
    assert (one < other) == ((one.epoch, one.attempt) < (other.epoch, other.attempt))


@pytest.mark.parametrize("text", ["", ".", "1", "1.", ".1", "1.2.3", "-1.2", "1. 2", "a.b", "１.２", "None.None"])
def test_text_that_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no token"):
        Token.parse(text)
