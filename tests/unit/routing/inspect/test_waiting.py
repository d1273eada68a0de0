"""Lines of the backlog: each kind of worker is judged once, and the numbers of jobs that stay in Postgres."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.database import staying_rows
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


class Engine:
    """Database of which a reader keeps its newest count."""


@pytest.mark.parametrize("corrected", [{"cpus=1": 400}, {}], ids=["corrected", "lost"])
def test_rows_are_counted_again_where_the_ledger_drops_its_number(
    monkeypatch: pytest.MonkeyPatch, corrected: Mapping[str, int]
) -> None:
    monkeypatch.setattr(staying_rows, "numbers", lambda _: {"cpus=1": 400})
    monkeypatch.setattr(waiting, "COUNTED_SHARE", 1e-9)
    connection: Any = SimpleNamespace(engine=Engine())
    # The ledger still counts 600 cancelled jobs.
    assert waiting.staying_numbers(connection, {"cpus=1": 1000}, 1) == {"cpus=1": 400}
    assert waiting.staying_numbers(connection, {"cpus=1": 999}, 1) == {"cpus=1": 399}
    assert waiting.staying_numbers(connection, corrected, 1) == {"cpus=1": 400}


def test_rows_are_counted_again_where_the_ledger_was_opened_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staying_rows, "numbers", lambda _: {"cpus=1": 400})
    monkeypatch.setattr(waiting, "COUNTED_SHARE", 1e-9)
    connection: Any = SimpleNamespace(engine=Engine())
    # A cold ledger has no numbers. Those of the new books are no jobs that came since.
    assert waiting.staying_numbers(connection, {}, None) == {"cpus=1": 400}
    assert waiting.staying_numbers(connection, {"cpus=1": 400}, 2) == {"cpus=1": 400}
