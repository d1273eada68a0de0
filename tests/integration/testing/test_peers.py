"""The table of `make bench-peers`."""

from __future__ import annotations

import re

from benchmarks.peers.__main__ import OURS
from benchmarks.peers.report import PAGE, RESULTS, Report

#: Rounds of ours and of two peers.
ROUNDS = {
    "ours": [{"bulk": 9000.0, "packing": 1.05}, {"bulk": 11000.0, "packing": 1.05}],
    "procrastinate": [{"bulk": 20000.0}, {"bulk": 20000.0}],
    "hyperqueue": [{"packing": 1.1}, {"packing": 1.1}],
}


def test_table_has_a_line_for_each_figure_of_a_peer() -> None:
    assert Report.of(ROUNDS, {}).lines() == [
        ("bulk", "jobs/s", "more", "10,000", "procrastinate", "20,000", "0.5", "≥ 1: no"),
        ("packing", "× lower bound", "less", "1.05", "hyperqueue", "1.1", "0.955", "–"),
    ]


def test_target_is_reached_by_as_many_jobs_as_the_peer() -> None:
    assert not Report.of(ROUNDS, {}).reached()
    assert Report.of({**ROUNDS, "procrastinate": [{"bulk": 10000.0}]}, {}).reached()


def test_stored_values_are_those_of_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    table = re.search(r"<!-- peers:begin -->\n(.*?)\n?<!-- peers:end -->", page, re.DOTALL)
    assert table is not None
    if RESULTS.exists():
        stored = Report.from_json(RESULTS.read_text(encoding="utf-8"))
        assert table[1] == stored.markdown()
        assert set(stored.values["ours"]) == set(OURS)
    else:
        assert table[1] == ""
