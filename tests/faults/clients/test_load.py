"""The load of a chaos run has every constraint, alone and together with others."""

from __future__ import annotations

from itertools import combinations

from tests.faults.clients.load import AT_ONCE, QUOTAS, options_of


def test_load_has_each_pair_of_constraints() -> None:
    kinds = {"lasts", "tenant", "limit", "rate", "where", "cpus"}
    loads = [options_of(number, 0.1) for number in range(2 * 420)]
    assert any(not kinds & options.keys() for options in loads)
    assert all(any({*pair} <= options.keys() for options in loads) for pair in combinations(kinds, 2))


def test_load_says_which_workers_have_the_label() -> None:
    loads = [options_of(number, 0.1) for number in range(420)]
    sides = {tuple(options["workers"]) for options in loads if "where" in options}
    assert sides == {("a", "c"), ("b", "d")}
    assert {most for options in loads for most in options.get("limit", {}).values()} == {AT_ONCE}


def test_each_quota_is_that_of_a_tenant_of_the_load() -> None:
    tenants = {options_of(number, 0.1).get("tenant") for number in range(420)}
    assert tenants == {*QUOTAS, None}
