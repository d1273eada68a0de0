"""Beat may die or run twice, and several workers may run the duties at once: nobody notices."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.workers.dispatch.submission_queue import SubmissionQueue
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.runner.duty_runner import DUTIES
from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until


def test_beat_dies_for_good_and_every_job_runs(
    platform: Platform, submitter: Submitter, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform.worker("a", cpus=4, pool="threads")
    beat = platform.beat()
    with oracle.flow(submitter):
        oracle.until_runs(10)
        oracle.asked(beat)
        beat.kill()
        oracle.whole_again("kill beat for good")
        with monkeypatch.context() as dying:
            # Strand these jobs: only a duty brings them in.
            dying.setattr(SubmissionQueue, "add", lambda *_, **__: None)
            stranded = oracle.sends(submitter, 3)
        later = [oracle.send(submitter, countdown=0.5) for _ in range(3)]
        for job in stranded + later:
            submitter.ended(job)
    oracle.assert_zeros()
    # Heartbeats go on without beat.
    until(lambda: submitter.view("a").get("status") == "ready", "a is ready")


def test_two_beats_do_no_harm(platform: Platform, submitter: Submitter, oracle: Oracle) -> None:
    platform.worker("a", cpus=4)
    platform.worker("b", cpus=2, pool="threads")
    platform.beat()
    schedule = str(platform.folder / "another-schedule")
    platform.start("beat", "beat", "--loglevel", "INFO", "--schedule", schedule, says="beat: Starting...")
    with oracle.flow(submitter):
        for _ in range(3):
            oracle.until_more(20)
            oracle.send(submitter, countdown=0.2)
    oracle.assert_zeros()


def test_four_reconciles_and_all_duties_at_once_under_load_do_no_harm(
    platform: Platform, submitter: Submitter, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, drift = threading.Event(), Counter[str]()
    for name in ("a", "b"):
        platform.worker(name, cpus=4, pool="threads")

    def repair() -> int:
        passes, stores = 0, Stores(lambda _: platform.settings)
        while not over.is_set() or passes < 4:
            with stores.engine.connect() as connection:
                stores.ledger.epoch = read_authority(connection).epoch
            for duty in DUTIES:
                counts = duty.run(submitter.app, stores)
                drift.update({name: count for name, count in counts.items() if name == "drift"})
            passes += 1
        stores.engine.dispose()
        stores.redis.close()
        return passes

    with ThreadPoolExecutor(4) as executor:
        repairers = [executor.submit(repair) for _ in range(4)]
        try:
            with monkeypatch.context() as dying:
                dying.setattr(SubmissionQueue, "add", lambda *_, **__: None)
                oracle.sends(submitter, 20)
            for _ in range(20):
                oracle.send(submitter, countdown=0.3)
            oracle.sends(submitter, 60)
            oracle.until_runs(100)
        finally:
            over.set()
        assert all(repairer.result() >= 4 for repairer in repairers)
    oracle.assert_zeros()
    assert drift.total() == 0


def test_duties_go_on_beside_a_ledger_that_is_emptied_again_and_again(
    platform: Platform, submitter: Submitter, oracle: Oracle
) -> None:
    """At each of its steps, a repairer may find that nothing needs a repair any more."""
    over, refused = threading.Event(), Counter[str]()
    platform.worker("a", cpus=4, pool="threads")

    def repair() -> None:
        stores = Stores(lambda _: platform.settings)
        while not over.is_set():
            for duty in DUTIES:
                try:
                    with stores.engine.connect() as connection:
                        stores.ledger.epoch = read_authority(connection).epoch
                    duty.run(submitter.app, stores)
                except (LedgerClosed, PlatformError) as error:
                    refused[type(error).__name__] += 1
        stores.engine.dispose()
        stores.redis.close()

    with ThreadPoolExecutor(2) as executor:
        repairers = [executor.submit(repair) for _ in range(2)]
        try:
            with oracle.flow(submitter):
                for _ in range(3):
                    oracle.until_more(10)
                    platform.redis.flushdb()
                    oracle.results_were_lost()
                oracle.until_more(10)
        finally:
            over.set()
        for repairer in repairers:
            repairer.result()
    oracle.assert_zeros()
