"""Places are written into shapes and read back, wrong ones are refused, and conditions hold for the right labels."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.expected import RunTime
from celery_capacity.routing.model.reasons import Reason
from celery_capacity.routing.model.request import Request, filed_shape, terms_of, timed
from celery_capacity.routing.policy.feasibility import count_before, find_shortfall, judge, kinds_of
from celery_capacity.routing.policy.labels import (
    Place,
    allows,
    labels_of_text,
    labels_text,
    named_worker,
    parse_labels,
    parse_where,
    place_of,
    place_of_options,
    split_condition,
)
from celery_capacity.routing.policy.placement import Admission, Book, Refusal, asked_shape, choose, held_by

ONE = Request.of({"cpus": 1000})
KEYS = st.text("abz019._-", min_size=1, max_size=8)
VALUES = st.text("aZ09._-", min_size=1, max_size=8)
WHERES = st.dictionaries(
    KEYS,
    st.one_of(
        VALUES,
        st.integers(-5, 5),
        st.lists(VALUES, min_size=1, max_size=3),
        VALUES.map(lambda value: f"!={value}"),
        st.lists(VALUES, min_size=1, max_size=3).map(lambda values: "in " + ",".join(values)),
        st.sampled_from([">=2", ">2", "<= 2.5", "<-3"]),
    ),
    max_size=4,
)
PLACES = st.builds(
    Place, WHERES.map(parse_where), st.sampled_from(["", "node-7", "W_1.x"]), st.booleans(), st.booleans()
)


def book(worker: str, cpus: int = 4000, **labels: str) -> Book:
    return Book(worker, {"cpus": cpus, "memory": 1, "slots": 4}, {}, labels=labels)


@given(PLACES, st.sampled_from(["", "tasks.render", "a?b+c,=~"]), st.booleans())
def test_place_is_read_back_from_the_filed_shape(place: Place, task: str, is_timed: bool) -> None:
    shape = place.shape(ONE)
    filed = filed_shape(timed(shape, RunTime(1000, 64_000)) if is_timed else shape, task)
    assert place_of(filed) == place
    assert terms_of(filed) == place.terms
    assert asked_shape(filed).startswith(shape), "an exclusive job asks to be alone itself"


def test_last_attempt_is_told_from_an_exclusive_job() -> None:
    last = held_by(ONE, losses=2, most_losses=3).shape
    assert asked_shape(last) == ONE.shape
    assert asked_shape(Place(exclusive=True).shape(ONE)) == f"alone=1,{ONE.shape},+exclusive"


@pytest.mark.parametrize(
    ("where", "labels", "is_met"),
    [
        ({"arch": "arm"}, {"arch": "arm"}, True),
        ({"arch": "arm"}, {"arch": "x86"}, False),
        ({"arch": "arm"}, {}, False),
        ({"arch": "!=x86"}, {}, True),
        ({"arch": "!=x86,arm"}, {"arch": "arm"}, False),
        ({"arch": "in arm, x86"}, {"arch": "x86"}, True),
        ({"arch": ["arm", "x86"]}, {"arch": "ppc"}, False),
        ({"mem": ">=2"}, {"mem": "10"}, True),
        ({"mem": ">=2"}, {"mem": "much"}, False),
        ({"mem": ">=2"}, {"mem": "1e9"}, False),
        ({"mem": "<2"}, {}, False),
        ({"mem": 2}, {"mem": "2"}, True),
        ({"arch": "arm", "mem": "<=2.5"}, {"arch": "arm", "mem": "2.5"}, True),
    ],
)
def test_condition_holds_for_the_labels(where: dict[str, Any], labels: dict[str, str], is_met: bool) -> None:
    assert allows(Place(where=parse_where(where)).terms, "w", labels) is is_met


@pytest.mark.parametrize(
    "options",
    [
        {"where": "arch=arm"},
        {"where": {"Arch": "arm"}},
        {"where": {"arch": "a b"}},
        {"where": {"arch": ""}},
        {"where": {"arch": []}},
        {"where": {"arch": True}},
        {"where": {"arch": "a,b"}},
        {"where": {"mem": ">=many"}},
        {"where": {str(n): "a" for n in range(17)}},
        {"where": {"arch": [str(n) for n in range(17)]}},
        {"worker": "a/b"},
        {"worker": 7},
        {"exclusive": "yes"},
        {"placement": "wide"},
    ],
)
def test_wrong_place_is_refused_with_advice(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as error:
        place_of_options(options)
    assert error.value.advice


@pytest.mark.parametrize(
    "terms",
    [
        ",?",
        ",?x",
        ",?arch:is:arm",
        ",?arch:in:b:a",
        ",?z:in:a/a:in:b",
        ",?mem:ge:x",
        ",?@",
        ",+wide",
        ",+spread:exclusive",
    ],
)
def test_forged_terms_are_refused(terms: str) -> None:
    with pytest.raises(InvalidRequest):
        place_of(ONE.shape + terms)


def test_place_of_a_call_goes_over_the_declared_one() -> None:
    declared = place_of_options({"where": {"arch": "arm"}, "placement": "spread", "exclusive": True})
    called = place_of_options({"where": {}, "worker": "w", "exclusive": False})
    assert called.over(declared) == Place((), "w", False, True)


@pytest.mark.parametrize("text", ["arch", "=arm", "Arch=arm", "arch=a b", "arch=", "arch=a,arch=b"])
def test_wrong_labels_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_labels(text, "PLATFORM_LABELS")


def test_labels_are_read_back_from_the_text_of_a_book() -> None:
    labels = parse_labels(" disk=ssd, arch=arm ,", "PLATFORM_LABELS")
    assert labels_text(labels) == "arch=arm,disk=ssd"
    assert labels_of_text(labels_text(labels)) == labels
    assert labels_of_text("") == {}


@pytest.mark.parametrize(
    ("text", "condition"),
    [("arch=arm", "arch=arm"), ("disk != hdd", "disk!=hdd"), ("mem>=64", "mem>=64"), ("disk in b,a", "disk in a,b")],
)
def test_condition_of_a_command_line_is_split(text: str, condition: str) -> None:
    assert [str(parsed) for parsed in parse_where(dict([split_condition(text, "--where")]))] == [condition]


def test_shortfall_says_what_is_asked_and_what_workers_have() -> None:
    books = [book("a", arch="x86"), book("b", arch="ppc")]
    short = find_shortfall(ONE, books, Place(where=parse_where({"arch": "arm", "disk": "ssd"})).terms)
    assert short is not None and short.reason is Reason.NO_LABEL
    assert str(short) == (
        "asks for arch=arm, disk=ssd, and no registered worker is such a one; the registered workers have"
        " arch=ppc, x86; no disk"
    )
    assert find_shortfall(ONE, books, Place(worker="b").terms) is None


def test_kinds_tell_labels_apart_and_a_named_worker_is_found() -> None:
    books = [book("a", arch="x86"), book("b", arch="arm"), book("c", arch="arm")]
    assert [kind.worker for kind in kinds_of(books)] == ["a", "b"]
    named = Place(worker="c").terms
    assert judge(ONE, books, terms=named) == Admission("c")
    refusal = judge(ONE, books, terms=Place(worker="d").terms)
    assert isinstance(refusal, Refusal) and refusal.reason is Reason.NO_LABEL
    filed = {ONE.shape + named: 2, ONE.shape + Place(worker="d").terms: 3}
    assert count_before(filed, books) == 2


def test_reason_equals_that_of_a_brute_force_oracle_by_labels() -> None:
    chance = random.Random(3)
    for _ in range(2000):
        books = [
            book(
                name, chance.choice([1000, 2000]), **({"arch": arch} if (arch := chance.choice(["", "x", "y"])) else {})
            )
            for name in "abcd"[: chance.randint(1, 4)]
        ]
        place = Place(
            parse_where(chance.choice([{}, {"arch": "x"}, {"arch": "!=x"}])),
            chance.choice(["", "", "a", "z"]),
            False,
            False,
        )
        request = Request.of({"cpus": chance.choice([1000, 2000, 3000])})
        allowed = [b for b in books if allows(place.terms, b.worker, b.labels)]
        fitting = sorted((b.capacity["cpus"], b.worker) for b in allowed if b.capacity["cpus"] >= request.get("cpus"))
        decision = judge(request, books, terms=place.terms)
        if fitting:
            assert decision == Admission(fitting[0][1])
            spread = place._replace(spread=True).terms
            assert choose(request, books, 9, terms=spread) == Admission(fitting[-1][1])
        else:
            assert isinstance(decision, Refusal)
            assert decision.reason is (Reason.TOO_LARGE if allowed else Reason.NO_LABEL)
        assert named_worker(place.terms) == place.worker
