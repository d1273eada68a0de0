"""The tables that the benchmarks write into the docs, and why a target is missed."""

from __future__ import annotations

import re

from benchmarks import __main__ as benchmarks
from benchmarks.explanations import REASONS, totals
from benchmarks.figures import FIGURES
from benchmarks.peers.report import AT_LEAST
from benchmarks.report import about_on, markdown, read_profiles, read_results
from benchmarks.size import report as size_report


def test_page_of_the_benchmarks_is_that_of_the_stored_results() -> None:
    page = benchmarks.PAGE.read_text(encoding="utf-8")
    table = re.search(r"<!-- benchmarks:begin -->\n(.*?)\n<!-- benchmarks:end -->", page, re.DOTALL)
    assert table is not None
    lines = benchmarks.judged(read_results(benchmarks.RESULTS))
    profiles = read_profiles(benchmarks.PROFILES)
    assert table[1] == markdown(lines, about_on(benchmarks.PAGE), profiles), "run: make bench ARGS=--pages"


def test_page_of_the_sizes_is_that_of_the_stored_results() -> None:
    page = size_report.PAGE.read_text(encoding="utf-8")
    table = re.search(r"<!-- size:begin -->\n(.*?)\n<!-- size:end -->", page, re.DOTALL)
    assert table is not None
    assert table[1] == size_report.Report.read().markdown(), "run: make bench-size ARGS=--pages"


def test_missed_targets_have_a_reason() -> None:
    missed = {
        line.result.figure for line in benchmarks.judged(read_results(benchmarks.RESULTS)) if line.reached is False
    }
    assert missed <= REASONS.keys()
    assert REASONS.keys() <= {figure.name for figure in FIGURES if figure.target is not None}
    assert [figure.name for figure in size_report.Report.read().missed() if not figure.why] == []


#: Figures of this page with the targets that they are to have.
TARGETS = {
    "submit": "≥ 1 × plain",
    "submit_unattended": "≥ 1 × plain",
    "submit_behind_20000": "≥ 1 × plain",
    "bulk": "≥ 12 × plain",
    "end_to_end": "≥ 1.05 × plain",
    "drain": "≥ 1 × plain",
    "drain_20000": "≥ 1 × plain",
    "chord_1000": "≥ 1 × plain",
    "latency_p50": "≤ 1.15 × plain",
    "latency_p95": "≤ 1.2 × plain",
    "end_to_start_p50": "≤ 1.2 × plain",
    "end_to_start_p95": "≤ 1.3 × plain",
    "end_to_start_two_sizes_p50": "≤ 1.2 × plain",
    "end_to_start_two_sizes_p95": "≤ 1.3 × plain",
    "packing": "≤ 1.06",
    "admit_vs_evalsha_3": "≤ 1.6 × EVALSHA",
    "admit_vs_evalsha_10000": "≤ 1.15 × at 3",
    "admit_vs_evalsha_10000_waiting_100000": "≤ 1.15 × at 3",
    "cpu_per_job": "≤ 1.05 × plain",
    "waiting_job_kb": "≤ 1 kB",
}


def test_figures_have_the_targets_that_were_set() -> None:
    targets = {figure.name: figure.target.text for figure in FIGURES if figure.target is not None}
    assert TARGETS.items() <= targets.items()
    assert AT_LEAST["bulk", "procrastinate"] == 1.0


def test_sum_of_a_profile_is_over_all_processes_of_both_sides() -> None:
    profile = ["ours", "  CPU, us: submitter 1,100, worker 0, Redis 60", "plain", "  CPU, us: submitter 500, Redis 80"]
    assert totals(profile) == "All processes together take 1,160 µs a job, and 580 µs with plain Celery: 2.00 ×."
    assert totals(profile[:2]) == ""
