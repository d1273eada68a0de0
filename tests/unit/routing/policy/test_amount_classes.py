"""Classes of free amounts keep their order, and are few."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.policy.amount_classes import CLASS_SPAN, amount_class


@given(st.integers(0, 2**60), st.integers(0, 2**60))
def test_a_larger_amount_is_in_no_earlier_class(one: int, other: int) -> None:
    assert (amount_class(one) <= amount_class(other)) or one > other
    assert amount_class(one) * CLASS_SPAN + CLASS_SPAN < 2**53


def test_amounts_double_in_four_classes_from_16_on() -> None:
    assert [amount_class(amount) for amount in range(-1, 17)] == [0, *range(17)]
    assert {amount_class(2 * amount) - amount_class(amount) for amount in range(16, 2000)} == {4}
