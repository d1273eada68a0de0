"""A million jobs of a generator in one call: the growth of the submitter's memory."""

from __future__ import annotations

import time
from typing import Final

from benchmarks.bench import Bench
from benchmarks.processes import submitter
from benchmarks.size.scale import Scale

#: Jobs that the process has submitted before, so that everything it needs is loaded. It still grows for some more
#: chunks.
FIRST: Final = 10_000


def streamed(bench: Bench, scale: Scale) -> dict[str, float]:
    """Submit a million jobs with no worker: all wait, which costs the submitter no less."""
    count = scale.of(1_000_000)
    with bench.pair() as pair, submitter("ours", pair) as sender:
        begin = time.monotonic()
        grown: float = sender.call("grown", task="bench.noop", first=FIRST, count=count)
        seconds = time.monotonic() - begin
    bench.say(f"  {count} jobs in {seconds:.0f} s, {grown:.1f} MB")
    return {"bulk_memory_mb": grown, "bulk_jobs_s": (FIRST + count) / seconds}
