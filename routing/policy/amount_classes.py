"""Classes of free amounts, by which the ledger's indexes of workers are sorted."""

from __future__ import annotations

#: Free millicores that an index of workers can tell apart within one class of amounts. Of more free CPUs it tells that
#: there are so many. A score stays below 2^53, whatever the class.
CLASS_SPAN = 2**32
#: Amount below which each amount is a class of its own, and classes in which an amount doubles from there.
FIRST_CLASSES, CLASSES_IN_DOUBLE = 16, 4


def amount_class(amount: int) -> int:
    """Return the class of a free amount in an index: a larger amount has the same class or a later one."""
    if amount < FIRST_CLASSES:
        return max(0, amount)
    exponent = amount.bit_length()
    return CLASSES_IN_DOUBLE * exponent + (amount >> (exponent - 3)) - 8
