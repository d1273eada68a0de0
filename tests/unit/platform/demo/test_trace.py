"""Traces: rows that are read and refused, the plan of a replay, and the numbers made of its tasks' records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.platform.demo import trace
from celery_capacity.platform.demo.trace import Job, Record
from celery_capacity.routing.errors import InvalidRequest


def read(text: str) -> list[Job]:
    return trace.read(text.splitlines(keepends=True))


def job(submit: float = 0, run: float = 1, cpus: int = 1000, row: int = 0) -> Job:
    return Job(row=row, submit=submit, run=run, cpus=cpus, line=row + 2)


# -- reading ------------------------------------------------------------------------------------------------


def test_columns_are_found_by_name_and_others_are_ignored() -> None:
    jobs = read("user,cpus,submit,note,run\nann,4,10,x,2.5\nbob,0.5,11,,0\n")
    assert jobs == [Job(0, 10.0, 2.5, 4000, 2), Job(1, 11.0, 0.0, 500, 3)]


def test_trace_skips_comments_blank_lines_marks_and_windows_line_ends() -> None:
    text = "\ufeff# a log\r\n\r\nsubmit,run,cpus\r\n# between\r\n0,1,1\r\n   \r\n  # and here\r\n5,1,2\r\n"
    jobs = read(text)
    assert [(entry.row, entry.line, entry.cpus) for entry in jobs] == [(0, 5, 1000), (1, 8, 2000)]


def test_a_byte_order_mark_before_the_header_belongs_to_no_name() -> None:
    assert read("\ufeffsubmit,run,cpus\n0,1,1\n")[0].cpus == 1000


def test_cells_may_be_quoted_and_padded() -> None:
    assert read('"submit", run ,"cpus",note\n" 3 ",1 ," 2","a, b"\n') == [Job(0, 3.0, 1.0, 2000, 2)]


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ("x,1,1", "'x'"),
        ("-1,1,1", "'-1'"),
        ("0,nan,1", "'nan'"),
        ("0,inf,1", "'inf'"),
        ("0,1e999,1", "'1e999'"),
        ("0,1_000,1", "'1_000'"),
        ("0,,1", "''"),
        ("0,1,four", "'four'"),
        ("0,1,-4", "'-4'"),
        ("0,1,1000001", "'1000001'"),
        ("0,1,0.0001", "'0.0001'"),
        ("0,1\0,1", "␀"),
    ],
)
def test_a_bad_value_is_refused_with_its_line_and_the_value(row: str, value: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(f"# comment\nsubmit,run,cpus\n0,1,1\n\n{row}\n")
    assert "line 5" in str(caught.value)
    assert value in str(caught.value)


def test_a_short_row_is_refused_with_its_line() -> None:
    with pytest.raises(InvalidRequest, match=r"line 3 .* no value for cpus"):
        read("submit,run,cpus\n0,1,1\n0,1\n")


@pytest.mark.parametrize("header", ["submit,run", "submit,run,cpu", "submit,run,cpus,cpus", "0,58,10"])
def test_a_header_must_name_each_column_once(header: str) -> None:
    with pytest.raises(InvalidRequest, match=r"line 1 .*submit, run, cpus"):
        read(f"{header}\n0,1,1\n")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "submit,run,cpus\n"])
def test_a_trace_without_jobs_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"empty|no jobs"):
        read(text)


def test_an_open_quote_does_not_swallow_rows() -> None:
    with pytest.raises(InvalidRequest, match="not CSV"):
        read('submit,run,cpus,note\n0,1,1,"oh\n0,1,1,\n')


def test_the_packaged_trace_keeps_its_acknowledgement_and_has_300_jobs() -> None:
    text = trace.PACKAGED.read_text()
    jobs = read(text)
    assert "graciously provided by Lars Malinowsky" in text
    assert len(jobs) == 300
    assert (jobs[0].submit, jobs[-1].submit) == (0.0, 434131.0)
    assert max(entry.cpus for entry in jobs) == 70_000


@given(st.text(alphabet="submitruncp,#\"' \n\r\t0123456789.-+eE\0\ufeff", max_size=80))
def test_any_text_is_read_or_refused_with_one_error(text: str) -> None:
    try:
        jobs = trace.read(text.splitlines(keepends=True))
    except InvalidRequest:
        return
    assert [entry.row for entry in jobs] == list(range(len(jobs)))


# -- the scale and the plan ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "scale"), [("1", 1.0), ("0.5", 0.5), ("10000", 10000.0), ("1e3", 1000.0)])
def test_a_scale_is_a_decimal_number(text: str, scale: float) -> None:
    assert trace.parse_scale(text) == scale


@pytest.mark.parametrize("text", ["0", "-1", "0.0", "nan", "inf", "fast", "", "1,5", "1e-999", "1_0", "0x10"])
def test_any_other_scale_is_refused_with_the_value(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        trace.parse_scale(text)
    assert repr(text) in str(caught.value)


def test_the_packaged_trace_takes_about_a_minute_by_default() -> None:
    jobs = read(trace.PACKAGED.read_text())
    assert trace.default_scale(jobs, 88_000) == 10_000


def test_a_short_trace_is_never_slowed_down() -> None:
    assert trace.default_scale([job(run=3), job(submit=2)], 1000) == 1


def test_the_default_scale_knows_that_a_narrow_cluster_takes_longer() -> None:
    jobs = [job(run=1000, row=row) for row in range(100)]
    assert trace.default_scale(jobs, 100_000) == 20
    assert trace.default_scale(jobs, 1_000) == 2_000


def test_a_plan_is_in_order_of_submission_and_begins_with_the_first() -> None:
    jobs = [job(submit=300, row=0), job(submit=100, run=50, row=1), job(submit=300, run=0, row=2)]
    plan = trace.plan(jobs, 100)
    assert [(planned.job.row, planned.at, planned.seconds) for planned in plan] == [
        (1, 0.0, 0.5),
        (0, 2.0, 0.05),
        (2, 2.0, 0.05),
    ]


def test_a_job_sleeps_at_least_50_ms() -> None:
    assert trace.plan([job(run=1)], 10_000)[0].seconds == 0.05


def test_job_wider_than_every_worker_is_named_with_the_size_it_needs() -> None:
    jobs = [job(cpus=4000), job(cpus=12_500, row=7), job(cpus=9000, row=8)]
    refused = trace.too_wide(jobs, {"a": 8000, "b": 12_000})
    assert refused is not None
    assert "job 7 (line 9 of the trace) needs 12.5 CPUs" in str(refused)
    assert "no worker has more than 12" in str(refused)
    assert "--worker NAME=12.5" in str(refused)


def test_a_job_as_wide_as_the_widest_worker_is_not_refused() -> None:
    assert trace.too_wide([job(cpus=12_000)], {"a": 8000, "b": 12_000}) is None


# -- what was measured --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 5), (95, 10), (90, 9), (100, 10)])
def test_percentiles_are_values_that_occurred(percent: float, expected: float) -> None:
    assert trace.percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], percent) == expected


def test_a_summary_counts_from_the_first_submission_to_the_last_end() -> None:
    records = [Record(0, 101.0, 103.0, "a"), Record(1, 103.0, 110.0, "a"), Record(2, 99.9, 100.5, "b")]
    summary = trace.summarise(records, {0: 100.0, 1: 101.0, 2: 100.0})
    assert summary.makespan == 10.0
    assert (summary.wait_mean, summary.wait_p95, summary.wait_max) == (1.0, 2.0, 2.0)


def test_a_summary_of_nothing_is_zero() -> None:
    assert trace.summarise([], {}) == trace.Summary(0.0, 0.0, 0.0, 0.0)


def test_the_peak_is_the_most_that_ran_at_once_on_each_worker() -> None:
    records = [
        Record(0, 0.0, 10.0, "a"),
        Record(1, 5.0, 15.0, "a"),
        Record(2, 10.0, 20.0, "a"),  # begins when job 0 ends
        Record(3, 0.0, 20.0, "b"),
    ]
    assert trace.peaks(records, {0: 4000, 1: 2000, 2: 3000, 3: 500}) == {"a": 6000, "b": 500}


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 10), st.integers(0, 8), st.sampled_from("ab")),
        max_size=25,
    )
)
def test_the_peak_equals_the_most_of_all_instants(runs: list[tuple[int, int, int, str]]) -> None:
    records = [Record(row, start, start + length, name) for row, (start, length, _, name) in enumerate(runs)]
    cpus = {row: amount for row, (_, _, amount, _) in enumerate(runs)}
    instants = [
        {
            name: sum(
                cpus[record.job] for record in records if record.worker == name and record.start <= at < record.end
            )
            for name in {record.worker for record in records}
        }
        for at in range(41)
    ]
    expected = {name: max(seen[name] for seen in instants) for name in {record.worker for record in records}}
    assert trace.peaks(records, cpus) == expected


def test_averages_are_cpu_seconds_over_the_makespan() -> None:
    records = [Record(0, 0.0, 10.0, "a"), Record(1, 5.0, 10.0, "a"), Record(2, 0.0, 20.0, "b")]
    assert trace.averages(records, {0: 4000, 1: 2000, 2: 500}, 20.0) == {"a": 2500, "b": 500}
    assert trace.averages([], {}, 0.0) == {}


def test_a_job_with_two_records_ran_twice() -> None:
    records = [Record(1, 0, 1, "a"), Record(2, 0, 1, "a"), Record(1, 5, 6, "b")]
    assert trace.doubled(records) == [1]


def test_the_log_is_in_order_of_starts_from_the_first_submission() -> None:
    records = [Record(1, 1002.5, 1003.0, "b"), Record(0, 1000.25, 1001.0, "a")]
    assert list(trace.log_rows(records, 1000.0)) == [
        (0, "0.250000", "1.000000", "a"),
        (1, "2.500000", "3.000000", "b"),
    ]
