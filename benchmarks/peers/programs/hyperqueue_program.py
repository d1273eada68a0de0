"""HyperQueue: a server and workers of different sizes in this process, and jobs of different widths that sleep."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from hyperqueue import Job, LocalCluster
from hyperqueue.cluster import WorkerConfig
from hyperqueue.ffi.protocol import ResourceRequest


def main() -> None:
    """Measure the makespan of the jobs to pack, and print it."""
    work: dict[str, Any] = json.loads(Path("work.json").read_text())
    with LocalCluster() as cluster:
        for cpus in work["workers"]:
            cluster.start_worker(WorkerConfig(cores=cpus))
        client = cluster.client()
        warm = Job()
        warm.program(["true"], resources=ResourceRequest(cpus=1))
        client.wait_for_jobs([client.submit(warm)])
        job = Job()
        for cpus, seconds in work["packed"]:
            job.program(["sleep", str(seconds)], resources=ResourceRequest(cpus=cpus))
        begin = time.monotonic()
        client.wait_for_jobs([client.submit(job)])
        print(json.dumps({"makespan": time.monotonic() - begin}))


if __name__ == "__main__":
    main()
