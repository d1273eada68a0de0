"""Suffixes of shapes give back their terms, and no task or amount is taken for one."""

from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.model.expected import RunTime
from celery_capacity.routing.model.request import (
    SIGNS,
    Request,
    filed_shape,
    run_time_of,
    split_shape,
    split_suffix,
    term_of,
    term_text,
    terms_of,
    timed,
    with_request,
)

TEXTS = st.text(min_size=1, max_size=20)
RUN_TIMES = st.sampled_from([RunTime(), RunTime(1000, 1000), RunTime(1000, 64_000)])
TERMS = st.dictionaries(st.sampled_from(SIGNS), TEXTS)


def suffix(terms: dict[str, str]) -> str:
    return "".join(f",{sign}{term_text(terms[sign])}" for sign in SIGNS if sign in terms)


@given(TERMS, TEXTS, RUN_TIMES)
def test_filed_shape_gives_back_its_terms_whatever_they_say(
    terms: dict[str, str], task: str, run_time: RunTime
) -> None:
    request = Request.of({"cpus": 4000, "queue:big": 1})
    filed = filed_shape(timed(request.shape + suffix(terms), run_time), task)
    assert Request.from_shape(filed) == request
    assert terms_of(filed) == suffix(terms)
    assert {sign: term_of(filed, sign) for sign in terms} == {sign: term_text(text) for sign, text in terms.items()}
    assert (run_time_of(filed).expected > 0) == (run_time.expected > 0)
    other = Request.of({"gpus": 1})
    assert with_request(filed, other) == filed_shape(timed(other.shape + suffix(terms), run_time), task)


@given(TEXTS)
def test_task_name_fakes_no_term(task: str) -> None:
    filed = filed_shape("cpus=1000,slots=1", task)
    assert split_suffix(filed) == (filed, "")
    assert [term_of(filed, sign) for sign in SIGNS] == [""] * len(SIGNS)
    assert split_shape(filed).suffix == ""
