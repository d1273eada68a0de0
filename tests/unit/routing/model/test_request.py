"""Requests: one value per need, however it was written."""

from __future__ import annotations

import pickle
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.request import (
    REQUEST_OPTIONS,
    Request,
    alternatives_from,
    alternatives_of,
    alternatives_term,
    check_alternatives,
    filed_shape,
    holding,
    number_held,
    with_request,
)

NAMES = st.one_of(st.sampled_from(["cpus", "memory", "gpus"]), st.text("abc_.-09", min_size=1, max_size=8))
REQUESTS = st.dictionaries(NAMES, st.integers(0, 1_000_000_000), max_size=8).map(Request.of)


def test_options_become_one_vector_with_a_slot() -> None:
    request = Request.from_options({"cpus": 4, "memory": "2GiB", "queue": "celery"}, default_cpus=1000)
    assert request.amounts == (("cpus", 4000), ("memory", 2147483648), ("slots", 1))
    assert request.shape == "cpus=4000,memory=2147483648,slots=1"
    assert request.to_people() == {"cpus": 4, "memory": 2147483648, "slots": 1}
    assert str(request) == "4 CPUs, 2 GiB memory"


def test_all_options_are_read() -> None:
    options: dict[str, Any] = {"cpus": 0.5, "memory": 5_000_000, "gpus": 1, "resources": {"licence": 2}}
    assert set(options) == set(REQUEST_OPTIONS)
    assert Request.from_options(options, 1000).to_people() == {
        "cpus": 0.5, "memory": 5_000_000, "gpus": 1, "slots": 1, "licence": 2,
    }  # fmt: skip


def test_computed_memory_makes_few_shapes_and_reserves_enough() -> None:
    sizes = [2**30 + number for number in range(0, 4 * 2**20, 4096)]
    requests = {Request.from_options({"memory": size}, 1000) for size in sizes}
    assert [request.get("memory") for request in sorted(requests, key=lambda row: row.get("memory"))] == [
        2**30 + number * 2**20 for number in range(5)
    ]
    # A published declaration, a header and a row stand as they are.
    assert Request.from_people({"memory": 5}).get("memory") == Request.from_shape("memory=5,slots=1").get("memory") == 5


@pytest.mark.parametrize("options", [{}, {"cpus": None}, {"memory": None, "gpus": None, "resources": None}])
def test_request_has_defaults_for_missing_options(options: dict[str, Any]) -> None:
    assert Request.from_options(options, default_cpus=1500).amounts == (("cpus", 1500), ("slots", 1))


def test_zero_cpus_are_a_request_and_are_shown() -> None:
    request = Request.from_options({"cpus": 0}, default_cpus=1000)
    assert request.shape == "slots=1"
    assert request.to_people() == {"cpus": 0, "slots": 1}
    assert str(request) == "0 CPUs"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"cpus": "4"}, "cpus='4'"),
        ({"cpus": True}, "cpus=True"),
        ({"cpus": -1}, "cpus=-1"),
        ({"cpus": float("nan")}, "cpus=nan"),
        ({"cpus": float("inf")}, "cpus=inf"),
        ({"cpus": 1e7}, "cpus=10000000.0"),
        ({"cpus": 0.0001}, "cpus=0.0001"),
        ({"memory": "2 potatoes"}, "memory='2 potatoes'"),
        ({"gpus": 0.5}, "gpus=0.5"),
        ({"resources": {"Big One": 1}}, "'Big One'"),
        ({"resources": {"memory": 1}}, "'memory'"),
        ({"resources": {f"r{i}": 1 for i in range(15)}}, "17 resources are too many"),
    ],
)
def test_wrong_options_are_refused_with_their_value(options: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Request.from_options(options, default_cpus=1000)
    assert why in str(caught.value)
    assert caught.value.advice


def test_a_call_s_options_stand_over_the_declaration() -> None:
    declared = Request.from_options({"cpus": 4, "memory": "1GiB", "resources": {"a": 1, "b": 2}}, 1000)
    assert declared.merged({}) is declared
    assert declared.merged({"cpus": 8}).to_people() == {**declared.to_people(), "cpus": 8}
    assert declared.merged({"memory": 0}).get("memory") == 0
    assert declared.merged({"resources": {"b": 0, "c": 3}}).to_people() == {
        "cpus": 4, "memory": 1024**3, "slots": 1, "a": 1, "c": 3,
    }  # fmt: skip
    with pytest.raises(InvalidRequest, match="cpus=-1"):
        declared.merged({"cpus": -1})


@given(REQUESTS)
def test_a_request_survives_its_shape_its_json_and_pickle(request_: Request) -> None:
    assert Request.from_shape(request_.shape) == request_
    assert Request.from_people(request_.to_people()) == request_
    assert pickle.loads(pickle.dumps(request_)) == request_
    assert Request.of(dict(request_.amounts)) == request_


@given(REQUESTS, REQUESTS)
def test_equal_requests_and_only_those_have_equal_shapes(one: Request, other: Request) -> None:
    assert (one == other) == (one.shape == other.shape)
    assert (one == other) <= (hash(one) == hash(other))


@pytest.mark.parametrize(
    "shape",
    ["", "cpus", "cpus=", "cpus=x,slots=1", "cpus=-1,slots=1", "slots=1,cpus=1", "cpus=0,slots=1",
     "cpus=1000",
     "slots=0", "cpus=٤,slots=1", "cpus=1,cpus=1,slots=1", "A=1,slots=1", "slots=1\n"],
)  # fmt: skip
def test_a_text_that_is_no_shape_is_refused(shape: str) -> None:
    with pytest.raises(InvalidRequest):
        Request.from_shape(shape)


def test_the_constructor_takes_the_canonical_form_only() -> None:
    with pytest.raises(InvalidRequest, match="are not canonical"):
        Request((("slots", 1), ("cpus", 1000)))
    with pytest.raises(InvalidRequest, match="slots=0 is too few"):
        Request((("cpus", 1000),))


def test_json_without_cpus_or_slots_means_none_and_one() -> None:
    assert Request.from_people({}).shape == "slots=1"
    assert Request.from_people({"cpus": 0.5, "slots": 2}).shape == "cpus=500,slots=2"


# -- alternatives


GPU_OR_CPUS: Final = alternatives_from(
    {"requests": [{"gpus": 1}, {"cpus": 32}]}, (), Request.from_options({"memory": "1GiB"}, 1000)
)
SHAPE: Final = GPU_OR_CPUS[0].shape + alternatives_term(GPU_OR_CPUS)


def test_alternatives_have_what_is_asked_for_beside_them() -> None:
    assert [str(request) for request in GPU_OR_CPUS] == ["1 CPU, 1 gpu, 1 GiB memory", "32 CPUs, 1 GiB memory"]


def test_shape_of_a_held_alternative_has_its_amounts_and_all_alternatives() -> None:
    held = holding(SHAPE + ",$physics,~655360", 2)
    assert Request.from_shape(held) == GPU_OR_CPUS[1]
    assert (number_held(held), number_held(SHAPE)) == (2, 0)
    assert alternatives_of(held) == check_alternatives(held) == GPU_OR_CPUS
    assert holding(held, 0) == SHAPE + ",$physics,~655360"
    assert holding("cpus=1000,slots=1", 2) == "cpus=1000,slots=1"


def test_last_attempt_is_alone_with_each_alternative() -> None:
    last = with_request(SHAPE, Request.of({**dict(GPU_OR_CPUS[0].amounts), "alone": 1}))
    assert [request.get("alone") for request in alternatives_of(last)] == [1, 1]
    assert Request.from_shape(holding(filed_shape(last, "tasks.render"), 2)).get("alone") == 1


def test_nearer_amounts_go_into_each_alternative() -> None:
    nearer = alternatives_from({"memory": "2GiB"}, GPU_OR_CPUS, GPU_OR_CPUS[0])
    assert [request.get("memory") for request in nearer] == [2**31, 2**31]
    assert alternatives_term(alternatives_from({"requests": [{}, {"cpus": 1}]}, (), Request.of({"cpus": 1000}))) == ""


@pytest.mark.parametrize(
    "shape",
    [
        "cpus=1000,slots=1,|cpus!1000;slots!1",
        "cpus=1000,slots=1,|cpus!1000;slots!1|cpus!1000;slots!1",
        "cpus=1000,slots=1,|slots!1;cpus!1000|cpus!2000;slots!1",
        "cpus=1000,slots=1,|cpus!1000;slots!1|nothing",
        "cpus=1000,slots=1,|" + "|".join(f"cpus!{n}000;slots!1" for n in range(1, 6)),
        "cpus=1000,slots=1,|cpus!1000;slots!1|cpus!1000;queue:mail!1;slots!1",
    ],
)
def test_forged_alternatives_are_refused(shape: str) -> None:
    with pytest.raises(InvalidRequest):
        check_alternatives(shape)
