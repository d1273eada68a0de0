"""The reasons that block a line of the backlog: each kind of worker is judged once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.inspect import waiting
from celery_capacity.routing.inspect.waiting import BLOCKING, BacklogLine, blocked_first
from celery_capacity.routing.model.request import Request, alternatives_term
from celery_capacity.routing.policy.feasibility import judge
from celery_capacity.routing.policy.placement import Admission, Book, Refusal

AMOUNTS = st.dictionaries(st.sampled_from(["cpus", "memory", "gpus"]), st.integers(0, 3))
BOOKS = st.lists(
    st.builds(lambda name, capacity, used, admitting: Book(name, {"slots": 2, **capacity}, used, admitting),
              st.sampled_from("abcdefgh"), AMOUNTS, AMOUNTS, st.booleans()),
    unique_by=lambda book: book.worker,
)  # fmt: skip


@given(AMOUNTS.map(Request.of), BOOKS)
def test_line_is_blocked_as_the_policy_says_of_all_workers(request_: Request, books: list[Book]) -> None:
    (line,) = blocked_first([BacklogLine(request_, 1, None)], books)
    decision = judge(request_, books)
    blocks = isinstance(decision, Refusal) and decision.reason in BLOCKING
    assert line.blocked == (decision.reason if blocks and isinstance(decision, Refusal) else None)


def test_equal_workers_are_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []

    def count(request: Request, books: Sequence[Book], *, terms: str) -> Admission:
        judged.append(len(books))
        return Admission("w0")

    monkeypatch.setattr(waiting, "judge", count)
    books = [Book(f"w{n}", {"cpus": 1000 * (1 + n % 2), "slots": 9}, {"cpus": n}) for n in range(100)]
    blocked_first([BacklogLine(Request.of({"cpus": n}), 1, None) for n in range(3)], books)
    assert judged == [2, 2, 2]


def test_line_of_jobs_with_alternatives_shows_them_in_order() -> None:
    gpu, wide = Request.of({"cpus": 1000, "gpus": 1}), Request.of({"cpus": 3000})
    line = BacklogLine(gpu, 2, None, terms=alternatives_term([gpu, wide]))
    assert line.request_text == "1 CPU, 1 gpu, or 3 CPUs"
    assert line.to_json()["alternatives"] == [gpu.to_people(), wide.to_people()]
    assert BacklogLine(gpu, 2, None).to_json()["alternatives"] == []
