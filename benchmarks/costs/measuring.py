"""The measured figures, each on all contenders in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks.costs.contender import Contender
from benchmarks.costs.system_calls import can_count
from benchmarks.processes import worker

#: Jobs of a round, of a round of single jobs, and of a round in one call.
JOBS, SINGLE, TOGETHER = 500, 200, 1000

#: Jobs before the first round, so that connections, scripts, prepared statements and pools are warm.
WARM_UP = 100

#: Processes of the worker that runs jobs, and threads of the one that has room for all of them.
PROCESSES, THREADS = 2, 2 * JOBS


def submit(contender: Contender) -> None:
    """Submit one by one to a stopped worker with room for all."""
    with _stopped(contender), contender.metered("submit", JOBS):
        contender.sender.call("submit", task="bench.noop", count=JOBS)
    contender.sender.call("gather")


def file_and_drain(contender: Contender) -> None:
    """Submit one by one behind a stopped worker that is full, then let it run them."""
    with _stopped(contender), contender.metered("file", JOBS):
        contender.sender.call("submit", task="bench.noop", count=JOBS)
    with contender.metered("drain", JOBS, settle=True):
        contender.sender.call("gather")


def bulk(contender: Contender) -> None:
    """Submit many in one call behind a stopped worker that is full."""
    with _stopped(contender), contender.metered("bulk", TOGETHER):
        contender.sender.call("submit_together", task="bench.noop", count=TOGETHER)
    contender.sender.call("gather")


def end_to_end(contender: Contender) -> None:
    """Submit while a worker runs, until the last result."""
    with contender.metered("end_to_end", JOBS, settle=True):
        contender.sender.call("end_to_end", task="bench.noop", count=JOBS)


def single(contender: Contender) -> None:
    """Submit a job when the one before it has its result: nothing is batched, so the counts hardly vary."""
    with contender.metered("single", SINGLE, settle=True):
        contender.sender.call("latency", task="bench.noop", count=SINGLE)


@dataclass(frozen=True)
class Measure:
    """A measurement of one or two figures, and the pool of the worker that it needs."""

    figures: tuple[str, ...]
    measure: Callable[[Contender], None]
    pool: str = "prefork"
    concurrency: int = PROCESSES


MEASURES = (
    Measure(("submit",), submit, "threads", THREADS),
    Measure(("file", "drain"), file_and_drain),
    Measure(("bulk",), bulk),
    Measure(("end_to_end",), end_to_end),
    Measure(("single",), single),
)

#: All figures, in the order of the table.
FIGURES = tuple(figure for measure in MEASURES for figure in measure.figures)


def run(
    contenders: Sequence[Contender],
    wanted: Sequence[str],
    rounds: int,
    say: Callable[[str], None],
    *,
    count_calls: bool = True,
) -> None:
    """Measure the wanted figures on all contenders, in turn, and their system calls in a round of their own."""
    count_calls = count_calls and can_count()
    pools: dict[tuple[str, int], list[Measure]] = {}
    for measure in MEASURES:
        if set(measure.figures) & set(wanted):
            pools.setdefault((measure.pool, measure.concurrency), []).append(measure)
    for (pool, concurrency), measures in pools.items():
        with _workers(contenders, pool, concurrency):
            for round_ in range(rounds + count_calls):
                counting = round_ == rounds
                about = "system calls" if counting else f"round {round_ + 1} of {rounds}"
                say(f"{about}: {', '.join(figure for measure in measures for figure in measure.figures)}")
                for measure in measures:
                    for contender in contenders:
                        contender.counting = counting
                        measure.measure(contender)
            for contender in contenders:
                contender.counting = False


@contextmanager
def _workers(contenders: Sequence[Contender], pool: str, concurrency: int) -> Iterator[None]:
    """Run a worker for each contender, and some jobs on it."""
    with ExitStack() as stack:
        for contender in contenders:
            started = worker(contender.side, contender.pair, pool=pool, concurrency=concurrency, cpus=concurrency)
            contender.worker = stack.enter_context(started)
            contender.sender.call("end_to_end", task="bench.noop", count=WARM_UP)
            contender.sender.call("latency", task="bench.noop", count=WARM_UP // 10)
        yield


@contextmanager
def _stopped(contender: Contender) -> Iterator[None]:
    """Stop the worker while the block runs. It stands for workers on other machines."""
    assert contender.worker is not None
    contender.worker.pause()
    try:
        yield
    finally:
        contender.worker.resume()
