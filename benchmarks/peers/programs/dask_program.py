"""Dask: a scheduler, and worker processes of one thread; or one process with as many threads as slots."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from distributed import Client, LocalCluster


def stamp(_: int) -> tuple[float, float]:
    """Do nothing, and return start and end."""
    return time.monotonic(), time.monotonic()


def hold(seconds: float) -> tuple[float, float]:
    """Sleep, and return start and end."""
    start = time.monotonic()
    time.sleep(seconds)
    return start, time.monotonic()


def main() -> None:
    """Measure, and print the figures."""
    work: dict[str, Any] = json.loads(Path("work.json").read_text())
    jobs, slots = work["jobs"], work["slots"]
    quiet = {"dashboard_address": None, "silence_logs": 50}
    figures: dict[str, Any] = {}
    with LocalCluster(n_workers=slots, threads_per_worker=1, **quiet) as cluster, Client(cluster) as client:
        client.gather([client.submit(stamp, -number, pure=False) for number in range(50)])
        begin = time.monotonic()
        client.gather([client.submit(stamp, number, pure=False) for number in range(jobs)])
        figures["end_to_end"] = jobs / (time.monotonic() - begin)
    with LocalCluster(n_workers=0, threads_per_worker=1, **quiet) as cluster, Client(cluster) as client:
        futures = [client.submit(stamp, number, pure=False) for number in range(jobs)]
        cluster.scale(slots)
        stamps = client.gather(futures)
        figures["drain"] = jobs / (max(end for _, end in stamps) - min(start for start, _ in stamps))
    held = work["held_slots"]
    with LocalCluster(n_workers=1, threads_per_worker=held, **quiet) as cluster, Client(cluster) as client:
        client.gather([client.submit(hold, 0.01, pure=False) for _ in range(held)])
        figures["held"] = client.gather([client.submit(hold, seconds, pure=False) for seconds in work["hold"]])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
