"""A million finished rows: their cost to a submission before and after archiving, and the speed of archiving."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Final

from sqlalchemy import create_engine, make_url, text

from benchmarks.bench import Bench
from benchmarks.books import EMPTY
from benchmarks.processes import Submitter, submitter
from benchmarks.servers import Pair
from benchmarks.size.scale import Scale
from benchmarks.size.stock import engine_of, environment, finish
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.recovery import rebuild
from celery_capacity.routing.store import archive

#: Submissions of one turn, and turns of each side.
CALLS: Final = 50
TURNS: Final = 40
#: Capacity of a worker with room for all submitted jobs, so that every submission is admitted and delivered.
ROOM: Final = "cpus=1000000000,memory=1073741824,slots=1000000"


def kept(bench: Bench, scale: Scale) -> dict[str, float]:
    """Measure submissions to two databases of one server in turn, one of them with a million finished jobs."""
    finished = scale.of(1_000_000)
    with bench.pair() as pair, ExitStack() as stack:
        full = stack.enter_context(_second(pair))
        engine = engine_of(full.database_url)
        with engine.connect() as connection:
            begin = time.monotonic()
            finish(connection, finished)
            bench.say(f"  {finished} rows after {time.monotonic() - begin:.0f} s")
        senders = [stack.enter_context(_sender(side)) for side in (pair, full)]
        before = _ratio(bench, *senders)
        moved, begin, longest = 0, time.monotonic(), 0.0
        with engine.connect() as connection:
            while True:
                start = time.monotonic()
                some = archive.archive_finished(connection, 86_400.0, archive.CHUNK)
                longest = max(longest, time.monotonic() - start)
                moved += some
                if not some:
                    break
            seconds = time.monotonic() - begin
            if moved != finished:
                raise RuntimeError(f"{moved} of {finished} rows moved")
            sizes = connection.execute(text(_SIZES)).one()
        bench.say(f"  {moved} rows moved in {seconds:.0f} s, at most {longest * 1000:.0f} ms a statement; {sizes}")
        after = _ratio(bench, *senders)
        engine.dispose()
        return {
            "submit_beside_finished": before,
            "submit_beside_archived": after,
            "archive_rows_s": moved / seconds,
            "archive_statement_ms": longest * 1000,
            "archived_bytes_per_job": sizes[0] / finished,
        }


#: Bytes of the archive, whose months are partitions, and of the tables of the jobs themselves.
_SIZES: Final = (
    "SELECT (SELECT sum(pg_total_relation_size(relid)) FROM unnest(ARRAY['jobs_archive', 'attempts_archive']) AS names,"
    " pg_partition_tree(names::regclass))::bigint, "
    "(pg_total_relation_size('jobs') + pg_total_relation_size('attempts'))::bigint"
)


@contextmanager
def _second(pair: Pair) -> Iterator[Pair]:
    """Make another database of the same Postgres, and use another one of the same Redis."""
    url = make_url(pair.database_url)
    server = create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE million TEMPLATE {url.database}"))
    server.dispose()
    database = url.set(database="million").render_as_string(hide_password=False)
    yield replace(pair, redis_url=f"{pair.redis_url.rsplit('/', 1)[0]}/2", database_url=database)


@contextmanager
def _sender(pair: Pair) -> Iterator[Submitter]:
    """Run a submitting program, and register the worker to which all jobs go. No process takes them there."""
    engine = engine_of(pair.database_url)
    ledger = Ledger(Settings.from_environ({**environment(pair), "PLATFORM_WORKER_TTL": "3600", **_LOST_AFTER}))
    rebuild.open_if_cold(engine, ledger)
    ledger.register("sink", "sink-life", "queue.sink", ROOM, EMPTY)
    try:
        with submitter("ours", pair) as sender:
            sender.call("submit", task="bench.noop", count=CALLS)
            yield sender
    finally:
        ledger.client.close()
        engine.dispose()


_LOST_AFTER: Final = {"PLATFORM_LOST_AFTER": "3600"}


def _ratio(bench: Bench, empty: Submitter, full: Submitter) -> float:
    """Return how many times as long a submission takes beside the million, by the medians over the turns."""
    taken: dict[Submitter, list[float]] = {empty: [], full: []}
    for turn in range(TURNS):
        for sender in (empty, full) if turn % 2 else (full, empty):
            taken[sender].append(sender.call("submit", task="bench.noop", count=CALLS) / CALLS * 1000)
    alone, beside = (statistics.median(of) for of in taken.values())
    bench.say(f"  a submission takes {alone:.3f} ms, and {beside:.3f} ms beside the others")
    return beside / alone
