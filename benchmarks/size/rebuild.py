"""An emptied Redis: the time until the first job is admitted again, and until all wait in the ledger as before."""

from __future__ import annotations

import threading
import time
from typing import Final

from benchmarks.bench import Bench
from benchmarks.size.crowd import Crowd
from benchmarks.size.scale import Scale
from benchmarks.size.stock import CPUS, WHOLE, Stock, engine_of, environment, fill
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.recovery import rebuild, transition_log

#: Processes of the crowd.
PROCESSES: Final = 2
#: Seconds between two looks at the counter of admissions.
LOOK_EVERY: Final = 0.005


def rebuilt(bench: Bench, scale: Scale) -> dict[str, float]:
    """Rebuild an empty Redis for 1,000 workers that run a job each, and 100,000 jobs that wait."""
    stock = Stock(scale.of(1000), running=scale.of(1000), waiting=scale.of(100_000))
    with bench.pair() as pair:
        engine = engine_of(pair.database_url)
        with engine.connect() as connection:
            fill(connection, stock)
        settings = Settings.from_environ(environment(pair) | WHOLE)
        ledger = Ledger(settings)
        crowd = Crowd(environment(pair) | WHOLE, stock.workers, PROCESSES, cpus=CPUS)
        try:
            before = int(ledger.client.info("memory")["used_memory"])
            first: list[float] = []
            begin = time.monotonic()
            watch = threading.Thread(target=_watch, args=(ledger, first), daemon=True)
            watch.start()
            done = rebuild.open_if_cold(engine, ledger)
            if done is None:
                raise RuntimeError("the ledger was not taken for cold")
            filed = time.monotonic() - begin
            watch.join()
            written, _ = transition_log.apply_all(engine, ledger)
            level = time.monotonic() - begin
            after = int(ledger.client.info("memory")["used_memory"])
            bench.say(f"  {done}, {written} entries written")
            # The duty looks once in this interval, every second.
            notice = settings.due_interval
            return {
                "rebuild_first_s": first[0] - begin + notice,
                "rebuild_all_s": filed + notice,
                "rebuild_level_s": level + notice,
                "redis_bytes_per_job": (after - before) / (stock.waiting + stock.running),
            }
        finally:
            crowd.end()
            ledger.client.close()
            engine.dispose()


def _watch(ledger: Ledger, first: list[float]) -> None:
    while not int(ledger.client.hget(keys.COUNTERS, "admitted") or 0):
        time.sleep(LOOK_EVERY)
    first.append(time.monotonic())
