"""Reasons to wait in Chinese: each has a sentence for each English one, with the same values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

import pytest

from celery_capacity.platform.console import wording
from celery_capacity.platform.web.pages import chinese_reasons
from celery_capacity.platform.web.pages.language import paragraph, reason_sentences
from celery_capacity.routing.forecast.record import Errors
from celery_capacity.routing.forecast.starts import EstimatedStart
from celery_capacity.routing.insert.key_lines import HeldBy
from celery_capacity.routing.inspect.explanation import Explanation, OverQuota
from celery_capacity.routing.model.reasons import EXPLAINED, Reason
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import State
from celery_capacity.routing.policy.missing import Missing, Room, Unblocking
from celery_capacity.routing.policy.pauses import Scope
from celery_capacity.routing.simulation.forecast import NoEstimate
from celery_capacity.routing.store.controls import Cordon, Pause

AT: Final = datetime(2026, 5, 4, 12, 30, 15, tzinfo=UTC)
GIB: Final = 2**30
ASKED: Final = Request.of({"cpus": 4000, "memory": 3 * GIB, "slots": 1, "licence": 2})
PLAIN: Final = Explanation(
    "job-7", State.WAITING, Reason.NO_ROOM, ASKED, True, resource="cpus", asked=4000, free=1500, worker="node-17"
)
#: Values with which a reason has further words.
WORDED: Final[tuple[Mapping[str, Any], ...]] = (
    {},
    {"worker": None, "exclusive": True, "tenant": None},
    {"place": 3, "position": 12, "large_enough": 5, "live_workers": 8, "declared": False},
    {"resource": "memory", "asked": 3 * GIB, "free": GIB, "labels": "disk: ssd, nvme", "where": "disk=tape"},
    {"resource": "gpus", "asked": 2, "free": -1, "tenant": "physics", "rate": "6/m", "needs": ("job-1", "job-2")},
    {"resource": "alone", "due_at": AT, "asked": 90_000, "free": 60_000},
    {"pause": Pause(Scope.of(queue="render"), "ann@host", AT, "disk 9 full")},
    {"pause": Pause(Scope.of(), "ann@host", AT, None)},
    {"cordon": Cordon("node-17", "ann@host", AT, "new disk", drains=True)},
    {"cordon": Cordon("node-17", "ann@host", AT, None)},
    {"key": HeldBy("customer:42", 2, None, 5, ("job-3", "job-4"), 1200, None)},
    {"key": HeldBy("customer:42", None, "10/h", 0, (), 6, AT)},
    {"key": HeldBy("customer:42", None, None, 0, (), 6, None)},
)


def numbers(sentence: str) -> list[str]:
    return sorted(re.findall(r"\d+(?:[.,:]\d+)*", sentence.replace(" in 9 of 10", "")))


def check(why: Explanation) -> None:
    """Hold the Chinese sentences to the English ones: as many, each with the same numbers, names and commands."""
    english, chinese = wording.sentences(why), chinese_reasons.sentences(why)
    assert len(chinese) == len(english)
    for ours, theirs in zip(chinese, english, strict=True):
        assert numbers(ours) == numbers(theirs), (ours, theirs)
        assert re.search(r"[\u4e00-\u9fff]", ours)
        assert not re.search(r"[a-z]{2,} [a-z]{2,} [a-z]{2,}", re.sub(r"celery -A .*|disk 9 full", "", ours)), ours
        for value in ("node-17", "physics", "ann@host", "disk 9 full", "customer:42", "job-1", "render", "uncordon"):
            assert (value in ours) == (value in theirs), (ours, theirs)


@pytest.mark.parametrize("reason", EXPLAINED)
def test_reason_has_the_values_of_the_english_sentence(reason: Reason) -> None:
    for values in WORDED:
        check(replace(PLAIN, why=reason, **values))


def test_lacks_of_workers_and_jobs_that_make_room_are_told() -> None:
    rooms = (Room("cpus", 4000, 1500, 16_000), Room("memory", GIB, 0, 8 * GIB), Room("slots", 1, 1, 4))
    rest = (Room("licence", 2, 1, 3), Room("fpga", 1, 0, 0), Room("cpus", 4000, 4000, 4000))
    lines = (
        Missing("node-17", True, rooms),
        Missing("node-18", True, rest),
        Missing("node-19", False, ()),
        Missing("node-20", True, (), alone=True),
    )
    for number in (1, 2, 8):
        jobs = tuple(f"job-{each}" for each in range(1, number + 1))
        check(replace(PLAIN, missing=lines, more_missing=number, unblocked_by=Unblocking("node-17", jobs)))
    over = OverQuota(ASKED, "memory", GIB, -1)
    check(replace(PLAIN, why=Reason.TENANT_QUOTA, over_quota=(over, over)))


@pytest.mark.parametrize("why_not", [*NoEstimate, None])
def test_start_is_told_or_why_it_is_not_estimated(why_not: NoEstimate | None) -> None:
    if why_not is not None:
        check(replace(PLAIN, estimate=EstimatedStart(None, None, why_not, 0, False, None)))
        return
    for seconds in (4.0, 240.0, 200_000.0):
        check(replace(PLAIN, estimate=EstimatedStart(AT, seconds, None, 0, False, None)))
        long = EstimatedStart(AT, seconds, None, 2000, True, Errors(20, 20.0, 180.0), True)
        check(replace(PLAIN, estimate=long))


def test_page_has_sentences_of_its_language_for_jobs_that_wait_alone() -> None:
    assert reason_sentences(PLAIN, "zh")[0].startswith("目前没有工作节点有空位：它需要 4 CPU，")
    assert reason_sentences(PLAIN, "en")[0].startswith("No worker has room now: it needs 4 CPUs,")
    assert reason_sentences(replace(PLAIN, why=Reason.RUNS), "zh") == []
    assert reason_sentences(None, "zh") == []


def test_sentences_are_joined_as_their_language_does() -> None:
    assert paragraph(["No.", "It waits."]) == "No. It waits."
    assert (
        paragraph(["没有。", "启动：celery -A platform worker", "它等待。"])
        == "没有。启动：celery -A platform worker 它等待。"
    )
    assert paragraph([]) == ""
