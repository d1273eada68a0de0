"""Names that become part of keys, queues and files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.identifiers import check_job_id, check_resource_name, check_worker_name

SAFE = "ABCXYZabcxyz0189_.-"


@given(st.text(SAFE, min_size=1, max_size=100))
def test_letters_digits_and_three_signs_make_a_worker_name(name: str) -> None:
    assert check_worker_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a b", "a:b", "a\n", "\na", "a\x00", "nöde", "n" * 101, "a/b", "a@b", "*", None, 7, b"node"]
)
def test_other_worker_names_are_refused_with_the_value(name: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_worker_name(name)
    assert repr(name)[:70] in str(caught.value)
    assert "1 to 100 characters of A-Z a-z 0-9 _ . -" in caught.value.advice


@given(st.text(max_size=120))
def test_no_worker_name_that_passes_can_break_a_key(name: str) -> None:
    try:
        check_worker_name(name)
    except InvalidRequest:
        return
    assert 1 <= len(name) <= 100
    assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")


@given(st.text("abcxyz0189_.-", min_size=1, max_size=64))
def test_small_letters_digits_and_three_signs_make_a_resource_name(name: str) -> None:
    assert check_resource_name(name) == name


@pytest.mark.parametrize("name", ["", "Licence", "a b", "a=1", "a,b", "a\n", "r" * 65, "é", None, 3])
def test_other_resource_names_are_refused_with_the_value(name: object) -> None:
    with pytest.raises(InvalidRequest, match="resource name") as caught:
        check_resource_name(name)
    assert "1 to 64 characters of a-z 0-9 _ . -" in caught.value.advice


@pytest.mark.parametrize("job_id", ["a", "7f0c2f1e-3b3c-4a7e-9f1e-0b9c", "nächtlich:42/ü", "j" * 255])
def test_printable_text_makes_a_job_id(job_id: str) -> None:
    assert check_job_id(job_id) == job_id


@pytest.mark.parametrize(
    "job_id", ["", "a b", "a\tb", "a\n", "a\x00b", "a\u2003b", "\u200b", "\ud800", "j" * 256, None, 7]
)
def test_other_job_ids_are_refused(job_id: object) -> None:
    with pytest.raises(InvalidRequest, match="task_id") as caught:
        check_job_id(job_id)
    assert "1 to 255 printable characters without white space" in caught.value.advice


@given(st.text(max_size=300))
def test_every_job_id_that_passes_can_be_stored_in_both_stores(job_id: str) -> None:
    try:
        check_job_id(job_id)
    except InvalidRequest:
        return
    assert "\x00" not in job_id
    assert job_id.encode() and not any(character.isspace() for character in job_id)
