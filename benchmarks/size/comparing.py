"""Reconcile, while nothing differs and work goes on: its duration, and how long it holds up an admission."""

from __future__ import annotations

import time

from sqlalchemy import text

from benchmarks.bench import Bench
from benchmarks.rounds import percentile
from benchmarks.size import admitting
from benchmarks.size.child import Child
from benchmarks.size.scale import Scale
from benchmarks.size.stock import WHOLE, Stock, engine_of, environment, fill
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.recovery import rebuild, reconcile, transition_log


def compared(bench: Bench, scale: Scale) -> dict[str, float]:
    """Compare 20,000 jobs that run on 1,000 workers and 80,000 that wait, during some 200 admissions a second."""
    stock = Stock(scale.of(1000), running=scale.of(20_000), waiting=scale.of(80_000))
    with bench.pair() as pair:
        engine = engine_of(pair.database_url)
        with engine.connect() as connection:
            fill(connection, stock)
            # Workers that were not seen for so long are not waited for.
            connection.execute(text("UPDATE workers SET seen_at = now() - interval '1 day'"))
        ledger = Ledger(Settings.from_environ(environment(pair) | WHOLE))
        rebuild.open_if_cold(engine, ledger)
        transition_log.apply_all(engine, ledger)
        child = Child(admitting.serve, environment(pair) | WHOLE)
        try:
            child.answer()
            child.ask("taken")
            time.sleep(2)
            alone = _taken(child)
            begin = time.monotonic()
            done = reconcile.reconcile(engine, ledger)
            seconds = time.monotonic() - begin
            meanwhile = _taken(child)
            bench.say(f"  {done.to_json()}")
            bench.say(f"  admissions alone: {_spread(alone)}; meanwhile: {_spread(meanwhile)}")
            if done.drift or done.checked < stock.running + stock.waiting:
                raise RuntimeError(f"nothing differs, and reconcile found {done.to_json()}")
            return {
                "reconcile_s": seconds,
                "reconcile_admission_p99_ms": percentile(meanwhile, 0.99),
                "reconcile_admission_max_ms": max(meanwhile),
                "idle_admission_max_ms": max(alone),
            }
        finally:
            child.end()
            ledger.client.close()
            engine.dispose()


def _taken(child: Child) -> list[float]:
    taken: list[float]
    taken, trouble = child.ask("taken")
    if trouble:
        raise RuntimeError(trouble)
    return taken


def _spread(taken: list[float]) -> str:
    return f"{len(taken)}, p50 {percentile(taken, 0.5):.2f}, p99 {percentile(taken, 0.99):.2f}, max {max(taken):.2f} ms"
