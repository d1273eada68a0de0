"""Jobs on their way to the ledger: at once, or in a row by a thread; in their order, and none is forgotten."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import pytest

from celery_capacity.workers.dispatch import submission_queue
from celery_capacity.workers.dispatch.breaker import Breaker, Submission
from celery_capacity.workers.dispatch.submission_queue import (
    IN_A_ROW,
    IN_A_ROW_BUSY,
    PAUSE,
    Beginning,
    Moment,
    SubmissionQueue,
)
from tests.fixtures.waiting import PATIENCE, until

#: Seconds, longer than any test takes.
ALWAYS = 1000.0


class Ledger(Breaker):
    """A ledger that notes the jobs that were brought, and by which threads.

    `open` lets the jobs on their way go on.
    """

    def __init__(self) -> None:
        self.brought: list[list[int]] = []
        self.threads: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.fails = False

    @property
    def closed(self) -> bool:
        return True

    def submit(self, jobs: Sequence[Submission], *, keep: bool = True) -> None:
        self.open.wait()
        self.brought.append([job.args[0] for job in jobs])
        self.threads.append(threading.current_thread().name)
        if self.fails:
            raise RuntimeError("something that nobody thought of")

    @property
    def jobs(self) -> list[int]:
        return [job for step in self.brought for job in step]


def job(number: int) -> Submission:
    return Submission(1, (number,))


def add(sent: SubmissionQueue, job: Submission, *, alone: bool = False) -> None:
    sent.add(job, sent.begin(), alone=alone)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def sent(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> SubmissionQueue:
    """Return submissions where every job that follows a first one is in a row with it."""
    monkeypatch.setattr(submission_queue, "IN_A_ROW", ALWAYS)
    monkeypatch.setattr(submission_queue, "PAUSE", ALWAYS)
    made = SubmissionQueue(ledger)
    made._last = Moment(-10 * ALWAYS)
    return made


def hold_up(ledger: Ledger, sent: SubmissionQueue) -> None:
    """Have the thread bring job 1 until the ledger is open again.

    Job 0 goes by itself.
    """
    add(sent, job(0))
    ledger.open.clear()
    add(sent, job(1))
    until(lambda: sent._left == 1 and not sent._waiting, "the thread has it")


def test_sender_that_waited_for_a_processor_alone_is_in_a_row() -> None:
    last = Moment(10.0, thread=1, waits=5)
    soon, later, long = last.at + IN_A_ROW / 2, last.at + IN_A_ROW * 2, last.at + IN_A_ROW_BUSY * 2
    same, other, waited = last, last._replace(thread=2), last._replace(waits=6)
    assert last.goes_on(soon, lambda: waited)
    assert last.goes_on(later, lambda: same)
    assert not last.goes_on(later, lambda: waited)
    assert not last.goes_on(later, lambda: other)
    assert not last.goes_on(long, lambda: same)
    # Where nobody counts, only time tells. A kernel that says 0 to a thread that has just waited for Postgres does not
    # count.
    uncounted = Moment(last.at, thread=1, waits=0)
    assert not uncounted.goes_on(later, lambda: uncounted)
    # A waiting thread has waited once more.
    before = Moment.now()
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert Moment.now()[1:] != before[1:] or not before.waits


def test_sender_that_waited_for_long_enough_has_paused() -> None:
    last = Moment(10.0, thread=1, waits=5)
    soon, later = last.at + PAUSE / 2, last.at + PAUSE * 2
    other, waited = last._replace(thread=2, waits=6), last._replace(waits=6)
    assert last.paused(later, lambda: waited)
    assert not last.paused(soon, lambda: waited)
    assert not last.paused(later, lambda: last)
    assert not last.paused(later, lambda: other)
    uncounted = Moment(last.at, thread=1, waits=0)
    assert not uncounted.paused(later, lambda: uncounted)


def test_a_single_job_is_there_when_its_sender_is_back(ledger: Ledger, sent: SubmissionQueue) -> None:
    add(sent, job(1))
    assert ledger.brought == [[1]]
    assert ledger.threads == [threading.current_thread().name]


def test_jobs_in_a_row_are_brought_by_a_thread_together_in_order(ledger: Ledger, sent: SubmissionQueue) -> None:
    hold_up(ledger, sent)
    for number in range(2, 50):
        add(sent, job(number))
    assert ledger.jobs == [0]
    ledger.open.set()
    assert sent.flush()
    assert ledger.brought == [[0], [1], [*range(2, 50)]]
    assert set(ledger.threads[1:]) == {"submissions"}


def test_long_row_is_brought_in_larger_steps_than_a_short_one(
    ledger: Ledger, sent: SubmissionQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission_queue, "GATHER_AT_MOST", ALWAYS)
    now = time.monotonic()
    sent._last = Moment(now - 2 * ALWAYS)
    add(sent, job(0))
    for number in (1, 2):
        # The row has just begun: nobody asks for this job, and it comes.
        add(sent, job(number))
        until(lambda number=number: ledger.jobs == [*range(number + 1)], "it is there")  # type: ignore[misc]
    sent._row = now - 100 * ALWAYS
    add(sent, job(3))
    until(lambda: not sent._resting, "the thread knows of it")
    add(sent, job(4))
    assert sent.flush()
    assert ledger.brought == [[0], [1], [2], [3, 4]]


def test_job_after_a_pause_is_not_gathered_with_those_before(
    ledger: Ledger, sent: SubmissionQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender of a thousand jobs a second has time left between two of them."""
    monkeypatch.setattr(submission_queue, "GATHER_AT_MOST", ALWAYS)
    hold_up(ledger, sent)
    ledger.open.set()
    sent._row = time.monotonic() - 100 * ALWAYS
    sent.add(job(2), Beginning(time.monotonic(), in_a_row=True, paused=True), alone=False)
    until(lambda: ledger.jobs == [0, 1, 2], "nobody asks for this job, and it comes")


def test_one_that_must_not_wait_goes_behind_those_that_do(ledger: Ledger, sent: SubmissionQueue) -> None:
    for number in range(5):
        add(sent, job(number))
    add(sent, job(5), alone=True)
    assert ledger.jobs == [*range(6)]
    assert ledger.threads[-1] == threading.current_thread().name


def test_senders_wait_for_a_thread_that_cannot_keep_up(
    ledger: Ledger, sent: SubmissionQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission_queue, "MAX_WAITING", 10)
    monkeypatch.setattr(submission_queue, "PATIENCE", ALWAYS)
    hold_up(ledger, sent)
    for number in range(2, 12):
        add(sent, job(number))
    another = threading.Thread(target=add, args=(sent, job(12)))
    another.start()
    until(lambda: sent._flushing, "the sender waits")
    assert len(sent._waiting) == 10
    ledger.open.set()
    another.join()
    assert sent.flush()
    assert ledger.jobs == [*range(13)]


def test_sender_does_not_wait_for_what_others_send_meanwhile(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission_queue, "IN_A_ROW", ALWAYS)
    monkeypatch.setattr(submission_queue, "PATIENCE", ALWAYS)
    others = threading.Event()
    plain = ledger.submit

    def submit(jobs: Sequence[Submission]) -> None:
        if jobs[0].args[0] > 1:
            others.wait()
        plain(jobs)

    monkeypatch.setattr(ledger, "submit", submit)
    sent = SubmissionQueue(ledger)
    sent._last = Moment(-10 * ALWAYS)
    hold_up(ledger, sent)
    waits = threading.Thread(target=sent.flush, daemon=True)
    waits.start()
    until(lambda: sent._flushing, "somebody waits for it")
    add(sent, job(2))
    ledger.open.set()
    waits.join(PATIENCE)
    assert ledger.jobs == [0, 1]
    others.set()
    assert sent.flush()
    assert ledger.jobs == [0, 1, 2]


def test_an_error_that_nobody_thought_of_stops_nothing(
    ledger: Ledger, sent: SubmissionQueue, caplog: pytest.LogCaptureFixture
) -> None:
    add(sent, job(0))
    ledger.fails = True
    add(sent, job(1))
    assert sent.flush()
    assert "1 jobs were not brought to the ledger" in caplog.text
    ledger.fails = False
    add(sent, job(2))
    assert sent.flush()
    assert ledger.jobs == [0, 1, 2]


def test_the_thread_ends_when_nothing_comes_and_another_one_follows(
    ledger: Ledger, sent: SubmissionQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission_queue, "REST_AT_MOST", 0.01)
    add(sent, job(0))
    for number in range(1, 4):
        add(sent, job(number))
        until(lambda: sent._thread is None, "the thread has ended")
    assert ledger.brought == [[0], [1], [2], [3]]


def test_where_there_can_be_no_thread_each_job_goes_at_once(
    ledger: Ledger, sent: SubmissionQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as there:
        there.setattr(threading.Thread, "start", refused)
        for number in range(3):
            add(sent, job(number))
        assert ledger.brought == [[0], [1], [2]]
    add(sent, job(3))
    assert sent.flush()
    assert ledger.threads[3:] == ["submissions"]


def test_large_jobs_wait_in_smaller_numbers(
    ledger: Ledger, sent: SubmissionQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission_queue, "PATIENCE", ALWAYS)
    hold_up(ledger, sent)
    half = submission_queue.MAX_BYTES // 2
    for number in (2, 3):
        add(sent, Submission(1, (number,), half))
    another = threading.Thread(target=add, args=(sent, Submission(1, (4,), half)))
    another.start()
    until(lambda: sent._flushing, "the sender waits")
    ledger.open.set()
    another.join()
    assert sent.flush()
    assert ledger.brought == [[0], [1], [2, 3], [4]]


def test_a_thread_that_is_dismissed_brings_what_it_has_and_ends(ledger: Ledger, sent: SubmissionQueue) -> None:
    for number in range(3):
        add(sent, job(number))
    thread = sent._thread
    assert thread is not None
    sent.dismiss()
    assert not thread.is_alive()
    assert ledger.jobs == [0, 1, 2]
    add(sent, job(3))
    assert sent.flush()
    assert ledger.jobs == [0, 1, 2, 3]
