"""Amounts that people write become integers, exactly, or are refused with a right example."""

from __future__ import annotations

import decimal
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.errors import InvalidRequest, show
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.amounts import (
    MAX_AMOUNT,
    canonical,
    cpus_number,
    format_amount,
    format_cpus,
    format_memory,
    from_people,
    memory_to_ask,
    memory_to_publish,
    named_resources,
    parse_count,
    parse_count_text,
    parse_cpus,
    parse_cpus_text,
    parse_memory,
    to_people,
)

MIB = 2**20
MILLICORES = st.integers(0, 1_000_000_000)


@pytest.mark.parametrize(
    ("value", "millicores"),
    [
        (0, 0),
        (-0.0, 0),
        (4, 4000),
        (0.5, 500),
        (0.001, 1),
        (0.1 + 0.2, 300),
        (1_000_000, 1_000_000_000),
        (Decimal("0.125"), 125),
        (Decimal("1e6"), 1_000_000_000),
        (Decimal("2.500000"), 2500),
    ],
)
def test_cpus_become_millicores(value: float | Decimal, millicores: int) -> None:
    assert parse_cpus(value) == millicores


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (True, "cpus=True is a bool"),
        ("4", "cpus='4' is text"),
        (b"4", "cpus=b'4' is text"),
        (None, "cpus=None is of type NoneType"),
        ([4], "cpus=[4] is of type list"),
        (1 + 1j, "cpus=(1+1j) is of type complex"),
        (float("nan"), "cpus=nan is not finite"),
        (float("inf"), "cpus=inf is not finite"),
        (float("-inf"), "cpus=-inf is not finite"),
        (Decimal("sNaN"), "cpus=Decimal('sNaN') is not finite"),
        (Decimal("Infinity"), "is not finite"),
        (-1, "cpus=-1 is negative"),
        (-1e-300, "is negative"),
        (1_000_000.001, "is above 1,000,000"),
        (1e7, "cpus=10000000.0 is above 1,000,000"),
        (10**5000, "is above 1,000,000"),
        (Decimal("1e999999"), "is above 1,000,000"),
        (0.0001, "cpus=0.0001 is finer than 0.001"),
        (1e-300, "is finer than 0.001"),
        (Decimal("0.0010000000000000000000000000000000000001"), "is finer than 0.001"),
        (Decimal("1e-999999"), "is finer than 0.001"),
    ],
    ids=lambda value: show(value)[:20],
)
def test_wrong_cpus_are_refused_with_the_value_and_what_is_right(value: object, why: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_cpus(value)
    assert why in caught.value.message
    assert caught.value.advice == "cpus must be a number from 0 to 1,000,000 in steps of 0.001, such as 4 or 0.5."


def test_decimals_are_exact_whatever_context_the_caller_has() -> None:
    with decimal.localcontext(decimal.Context(prec=2)):
        assert parse_cpus(Decimal("123456.789")) == 123_456_789


@given(MILLICORES)
def test_cpus_survive_every_way_of_writing_them(millicores: int) -> None:
    assert parse_cpus_text(format_cpus(millicores)) == millicores
    assert parse_cpus(cpus_number(millicores)) == millicores
    assert parse_cpus(Decimal(millicores) / 1000) == millicores
    assert from_people(to_people(canonical({"cpus": millicores})))["cpus"] == millicores


@given(st.one_of(st.floats(), st.integers(), st.decimals(), st.text(), st.booleans(), st.none()))
def test_cpus_are_accepted_in_range_or_refused_and_nothing_else(value: object) -> None:
    try:
        millicores = parse_cpus(value)
    except InvalidRequest:
        return
    assert isinstance(value, (int, float, Decimal))
    assert 0 <= millicores <= 1_000_000_000
    assert abs(Decimal(value) * 1000 - millicores) < Decimal("0.000001")


@pytest.mark.parametrize(("text", "millicores"), [("0.5", 500), (" 72 ", 72_000), ("4.0", 4000), (".25", 250)])
def test_cpus_may_be_text_where_all_is_text(text: str, millicores: int) -> None:
    assert parse_cpus_text(text, "PLATFORM_CPUS") == millicores


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "1e3", "4 CPUs", "٤", "1_000", "1,5", "1000000.1", "0.0001"])
def test_wrong_cpus_in_text_name_where_they_stand(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^PLATFORM_CPUS='") as caught:
        parse_cpus_text(text, "PLATFORM_CPUS")
    assert "PLATFORM_CPUS must be a number from 0 to 1,000,000" in caught.value.advice


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (0, 0),
        (1, 1),
        ("0", 0),
        ("1024", 1024),
        ("1024B", 1024),
        ("2GiB", 2 * 1024**3),
        ("2 GiB", 2 * 1024**3),
        ("2Gi", 2 * 1024**3),
        ("512MiB", 512 * 1024**2),
        ("1.5G", 1_500_000_000),
        ("1.5GB", 1_500_000_000),
        ("3k", 3000),
        ("1KiB", 1024),
        ("4T", 4 * 10**12),
        ("1tib", 1024**4),
        (" .5KiB ", 512),
        ("1.1GiB", 1_181_116_007),
        ("0.0000000001K", 1),
    ],
)
def test_memory_becomes_bytes(value: object, size: int) -> None:
    assert parse_memory(value) == size


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("2 potatoes", "memory='2 potatoes' is not an amount of memory"),
        ("", "memory='' is not an amount"),
        ("GiB", "memory='GiB' is not"),
        ("-1G", "memory='-1G' is not"),
        ("1e9", "memory='1e9' is not"),
        ("1 G i B", "is not"),
        ("٢GiB", "is not"),
        ("1" * 5000, "is not"),
        (-1, "memory=-1 is negative"),
        (1.5, "memory=1.5 is of type float"),
        (True, "memory=True is a bool"),
        (None, "memory=None is of type NoneType"),
        (b"2GiB", "memory=b'2GiB' is text"),
        (2**52 + 1, "is above 4 PiB"),
        ("5000TiB", "memory='5000TiB' is above 4 PiB"),
    ],
    ids=lambda value: show(value)[:20],
)
def test_wrong_memory_is_refused_with_the_value_and_what_is_right(value: object, why: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_memory(value)
    assert why in caught.value.message
    assert "'512MiB', '2GiB' or '1.5G'" in caught.value.advice


@given(st.integers(0, 4000), st.sampled_from(["K", "M", "G", "T"]))
def test_the_i_means_powers_of_1024(number: int, prefix: str) -> None:
    power = " KMGT".index(prefix)
    assert parse_memory(f"{number}{prefix}") == number * 1000**power
    assert parse_memory(f"{number}{prefix}iB") == number * 1024**power


@given(st.text())
def test_any_text_is_memory_or_refused(text: str) -> None:
    try:
        assert 0 <= parse_memory(text) <= amounts.MAX_AMOUNT
    except InvalidRequest as error:
        assert error.advice


@pytest.mark.parametrize(
    ("size", "asked", "published"),
    [
        (0, 0, 0),
        (1, MIB, 1),
        (MIB - 1, MIB, MIB - 1),
        (MIB, MIB, MIB),
        (MIB + 1, 2 * MIB, MIB),
        (1_000_000_000, 1_000_000_000, 1_000_000_000),
        (1_000_000_001, 954 * MIB, 953 * MIB),
        (MAX_AMOUNT - 1, MAX_AMOUNT, MAX_AMOUNT - MIB),
    ],
)
def test_memory_is_asked_for_and_published_in_whole_steps(size: int, asked: int, published: int) -> None:
    assert (memory_to_ask(size), memory_to_publish(size)) == (asked, published)


@given(st.integers(0, MAX_AMOUNT))
def test_job_may_ask_for_all_that_a_worker_publishes(size: int) -> None:
    published = memory_to_publish(size)
    assert memory_to_ask(size) >= size >= published
    assert memory_to_ask(published) == published or published < MIB


@pytest.mark.parametrize("value", [-1, True, 1.0, "1", None, 2**52 + 1])
def test_wrong_counts_are_refused(value: object) -> None:
    with pytest.raises(InvalidRequest, match="gpus=") as caught:
        parse_count(value, "gpus")
    assert "gpus must be a whole number from 0 to" in caught.value.advice


def test_counts_are_whole_numbers() -> None:
    assert parse_count(3, "gpus") == 3
    assert parse_count_text(" 3 ", "gpus") == 3
    for text in ("", "-1", "1.5", "x", "٣"):
        with pytest.raises(InvalidRequest, match="gpus="):
            parse_count_text(text, "gpus")


@pytest.mark.parametrize(
    ("millicores", "text", "number"),
    [
        (0, "0", 0),
        (72_000, "72", 72),
        (500, "0.5", 0.5),
        (1, "0.001", 0.001),
        (1250, "1.25", 1.25),
        (-500, "-0.5", -0.5),
    ],
)
def test_people_see_cpus_as_a_decimal_number(millicores: int, text: str, number: float) -> None:
    assert format_cpus(millicores) == text
    assert cpus_number(millicores) == number
    assert isinstance(cpus_number(millicores), int) == (millicores % 1000 == 0)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (2 * 1024**3, "2 GiB"),
        (3 * 1024**3 // 2, "1.5 GiB"),
        (512 * 1024**2, "512 MiB"),
        (1024**5 * 4, "4 PiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_people_see_memory_in_powers_of_1024(size: int, text: str) -> None:
    assert format_memory(size) == text


def test_amounts_in_words() -> None:
    words = [("cpus", 1000), ("cpus", 500), ("memory", 1024), ("gpus", 1), ("slots", 2), ("licence", 3)]
    assert [format_amount(*pair) for pair in words] == [
        "1 CPU", "0.5 CPUs", "1 KiB memory", "1 gpu", "2 slots", "3 licence",
    ]  # fmt: skip


def test_equal_vectors_have_one_form() -> None:
    assert canonical({"slots": 1, "cpus": 4000, "memory": 0}) == (("cpus", 4000), ("slots", 1))
    assert canonical([("slots", 1), ("cpus", 4000)]) == (("cpus", 4000), ("slots", 1))


@pytest.mark.parametrize("wrong", [{"Cpus": 1}, {"cpus": -1}, {"cpus": 1.5}, {"cpus": True}, {"": 1}, {3: 1}])
def test_a_vector_of_wrong_names_or_amounts_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest):
        canonical(wrong)


def test_a_vector_has_at_most_sixteen_names() -> None:
    assert len(canonical({f"r{i}": 1 for i in range(16)})) == 16
    with pytest.raises(InvalidRequest, match="17 resources are too many"):
        canonical({f"r{i}": 1 for i in range(17)})


def test_people_see_standard_resources_first_and_cpus_always() -> None:
    vector = canonical({"slots": 1, "a": 2, "memory": 5, "gpus": 1})
    assert list(to_people(vector).items()) == [
        ("cpus", 0),
        ("memory", 5),
        ("gpus", 1),
        ("slots", 1),
        ("a", 2),
    ]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (["licence"], "of type list, not a mapping"),
        ("licence", "is text, not a mapping"),
        ({"Licence": 1}, "resources: name 'Licence' is not valid"),
        ({"a b": 1}, "resources: name 'a b' is not valid"),
        ({"licence": "1"}, "resources['licence']='1' is text"),
        ({"licence": -1}, "resources['licence']=-1 is negative"),
        ({"cpus": 1}, "names 'cpus', which is not a named resource"),
        ({"slots": 1}, "names 'slots', which is not a named resource"),
    ],
)
def test_wrong_named_resources_are_refused(value: object, why: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        named_resources(value)
    assert why in caught.value.message
    assert caught.value.advice
