"""`python -m benchmarks.peers`: ours beside procrastinate, Dask and HyperQueue, in turn."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import latency, packing, throughput
from benchmarks.bench import Bench
from benchmarks.figures import BY_NAME
from benchmarks.peers.environment import python, versions
from benchmarks.peers.report import PAGE, PLACE, RESULTS, Report
from benchmarks.report import update_page
from benchmarks.rounds import percentile
from benchmarks.servers import private_pair

#: Folder of the programs, and seconds for one to end.
PROGRAMS, PATIENCE = Path(__file__).with_name("programs"), 900.0

#: Rounds by default: one takes three minutes.
ROUNDS = 3

#: Figures of ours that a peer has too.
OURS = ("bulk", "end_to_end", "drain", "end_to_start_p50", "end_to_start_p95", "packing")

#: Values of a peer by figure.
Values = Mapping[str, float]


def work(round_: int) -> dict[str, Any]:
    """Return what the programs are to run: the same jobs as ours."""
    return {
        "jobs": throughput.END_TO_END,
        "slots": throughput.CONCURRENCY,
        "together": throughput.TOGETHER,
        "held_slots": latency.SLOTS,
        "hold": latency.held_seconds(),
        "workers": list(packing.WORKERS.values()),
        "packed": [(job.cpus, job.seconds) for job in packing.jobs(round_)],
    }


def run(name: str, interpreter: str, round_: int) -> dict[str, Any]:
    """Run a peer's program on a Postgres of its own, in a folder of its own. Return what it printed."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, private_pair(Path(folder)) as pair:
        (Path(folder) / "work.json").write_text(json.dumps(work(round_)))
        url = pair.database_url.replace("postgresql+psycopg2://", "postgresql://", 1)
        done = subprocess.run(
            [interpreter, str(PROGRAMS / f"{name}_program.py")],
            cwd=folder,
            env={**os.environ, "PEER_DATABASE": url},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
    if done.returncode != 0:
        raise RuntimeError(f"the program of {name} failed:\n{done.stderr[-2000:]}")
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def peer(name: str, interpreter: str, round_: int) -> Values:
    """Return the values of a peer in a round, under the names of our figures."""
    values = run(name, interpreter, round_)
    if held := values.pop("held", None):
        gaps = latency.idle_gaps([(start, end) for start, end in held], latency.SLOTS)
        values |= {"end_to_start_p50": percentile(gaps, 0.5), "end_to_start_p95": percentile(gaps, 0.95)}
    if makespan := values.pop("makespan", None):
        bound = packing.lower_bound(packing.jobs(round_), sum(packing.WORKERS.values()))
        values["packing"] = makespan / bound
    return values


def ours(round_: int) -> Values:
    """Return our values in a round."""
    bench = Bench(1)
    values = {}
    for name in OURS:
        bench.say(name)
        sides = BY_NAME[name].measure(bench) if name != "packing" else packing.packed_draws(bench, [round_])
        values[name] = statistics.median(sides.ours)
    return values


def main(arguments: Sequence[str]) -> int:
    """Measure, write and print. Return 1 if a target was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="Measures this platform beside other systems, in turn."
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the medians as JSON, and write nothing")
    chosen = parser.parse_args(arguments)
    interpreter = python()
    rounds: dict[str, list[Values]] = {"ours": [], "procrastinate": [], "dask": [], "hyperqueue": []}
    for round_ in range(chosen.rounds):
        for name, measured in rounds.items():
            print(f"[round {round_ + 1} of {chosen.rounds}] {name}", file=sys.stderr, flush=True)
            measured.append(ours(round_) if name == "ours" else peer(name, interpreter, round_))
    report = Report.of(rounds, versions(interpreter))
    if chosen.json:
        sys.stdout.write(report.as_json())
    else:
        RESULTS.write_text(report.as_json())
        if not update_page(PAGE, report.markdown(), PLACE):
            print(f"{PAGE} has no table to update", file=sys.stderr)
        sys.stdout.write(report.text())
    return 0 if report.reached() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
