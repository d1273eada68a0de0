"""`celery -A platform whatif`: the backlog as it would empty with other workers, or by another policy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

from celery_capacity.platform.console.command import Command, json_option, stores_of
from celery_capacity.platform.console.terminal import facts, print_json, table
from celery_capacity.platform.processes.launch import WorkerSpec, parse_workers
from celery_capacity.routing.errors import InvalidRequest, show
from celery_capacity.workers.display.progress_bar import command_bar
from celery_capacity.workers.process.exit_codes import Exit

if TYPE_CHECKING:
    from rich.console import Console

    from celery_capacity.routing.forecast.whatif import Today
    from celery_capacity.routing.simulation.forecast import Outcome, Waits

#: Milliseconds in a second.
MS: Final = 1000
#: Kinds of jobs that people see: those with the most waiting jobs.
SHOWN_KINDS: Final = 10
#: Policies by name, with their depth of backfill.
POLICIES: Final = {"greedy": 0, "easy": 1}
_DEPTH: Final = re.compile(r"depth=(\d{1,3})", re.ASCII)


def parse_policy(_context: click.Context, _parameter: click.Parameter, text: str | None) -> int | None:
    """Return the depth of backfill that `--policy` names, None where it is not given."""
    if text is None or text in POLICIES:
        return None if text is None else POLICIES[text]
    if (match := _DEPTH.fullmatch(text)) is None:
        raise click.BadParameter(f"{text!r} is no policy. Give greedy, easy, or depth=N with N reserved requests.")
    return int(match[1])


@click.command(
    "whatif",
    cls=Command,
    examples=(
        ("When the backlog is empty, as things are", "celery -A platform whatif"),
        ("With one more worker", "celery -A platform whatif --add-worker big=128"),
        ("Without a worker, by EASY backfill", "celery -A platform whatif --remove worker-02 --policy easy"),
    ),
    codes={Exit.OK: "the forecast is made", Exit.FAILED: "there is no such worker, or the cluster is too large"},
)
@click.option(
    "--add-worker", "add", metavar="NAME=CPUS", multiple=True, callback=parse_workers, help="One more worker; again."
)
@click.option("--remove", metavar="NAME", multiple=True, help="A worker that takes no more jobs; again for more.")
@click.option("--policy", "depth", metavar="POLICY", callback=parse_policy, help="greedy, easy or depth=N.")
@json_option
@click.pass_context
def command(
    context: click.Context, add: tuple[WorkerSpec, ...], remove: tuple[str, ...], depth: int | None, as_json: bool
) -> None:
    """Say how the backlog would empty with other workers, or by another policy.

    The policy decides in virtual time on a copy of the cluster. Nothing is written. It says when no job waits
    any more, and how long jobs wait from now on, as things are and with the change.

    No job comes later, and each runs as long as it is expected to. An unknown run time is the median of the
    known ones. A removed worker ends the jobs that run there. Of a large backlog the first 5,000 jobs are taken;
    where tenants share the workers, as many of each.
    """
    from celery_capacity.platform.demo.simulated import books_of
    from celery_capacity.routing.forecast.whatif import read_today
    from celery_capacity.routing.ledger.connection import quick_client
    from celery_capacity.routing.simulation import forecast

    stores = stores_of(context)
    with stores.engine.execution_options(isolation_level="REPEATABLE READ").connect() as connection:
        today = read_today(quick_client(stores.redis), connection, stores.settings)
    _check_names(today, add, remove)
    after = None
    jobs, changes = len(today.cluster.running) + len(today.cluster.waiting), add or remove or depth is not None
    with command_bar("simulated jobs", 2 * jobs if changes else jobs) as bar:
        as_is = forecast.outcome(today.cluster, today.rules, bar.advance)
        if changes:
            rules = today.rules if depth is None else replace(today.rules, depth=depth)
            other = forecast.changed(today.cluster, list(books_of(add).values()), remove)
            after = forecast.outcome(other, rules, bar.advance)
    if as_json:
        change = {"add": [spec.name for spec in add], "remove": list(remove), "depth": depth}
        print_json(_json(today, change, as_is, after))
    else:
        _show(today, as_is, after)


def _check_names(today: Today, add: Sequence[WorkerSpec], remove: Sequence[str]) -> None:
    workers = today.cluster.books
    live = ", ".join(sorted(workers)[:10]) or "none"
    for name in remove:
        if name not in workers:
            raise InvalidRequest(f"--remove {show(name)}: no such worker lives", value=name, advice=f"Live: {live}.")
    for spec in add:
        if spec.name in workers:
            raise InvalidRequest(
                f"--add-worker {spec.name}: a worker of this name lives", value=spec.name, advice="Take another name."
            )


def _json(today: Today, change: dict[str, Any], as_is: Outcome, after: Outcome | None) -> dict[str, Any]:
    cluster = today.cluster
    return {
        "at": datetime.fromtimestamp(cluster.now / MS, UTC).isoformat(timespec="milliseconds"),
        "source": today.source.value,
        "running": len(cluster.running),
        "waiting": len(cluster.waiting) + cluster.beyond,
        "simulated": len(cluster.waiting),
        "guessed": cluster.guessed,
        "guess_seconds": today.guess / MS if today.guess else None,
        "change": change,
        "as_it_is": _outcome_json(as_is),
        "changed": None if after is None else _outcome_json(after),
    }


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    from celery_capacity.routing.model.request import Request, alternatives_to_show

    kinds = [
        {
            "task": task,
            "request": Request.from_shape(shape).to_people(),
            "alternatives": [request.to_people() for request in alternatives_to_show(shape)],
            **_waits_json(waits),
        }
        for (task, shape), waits in _by_size(outcome)
    ]
    empty = outcome.empty_after
    return {
        "workers": outcome.workers,
        "depth": outcome.rules.depth,
        "without_reservations": outcome.without_reservations,
        "empty_seconds": None if empty is None else empty / MS,
        **_waits_json(outcome.waits),
        "kinds": kinds,
        "tenants": [{"tenant": name, **_waits_json(waits)} for name, waits in sorted(outcome.by_tenant.items())],
    }


def _waits_json(waits: Waits) -> dict[str, Any]:
    seconds = {
        "mean": round(waits.mean / MS, 3),
        **{name: waits.percentile(percent) / MS for name, percent in (("p50", 50), ("p95", 95), ("max", 100))},
    }
    return {"starts": len(waits.times), "never": waits.never, "wait_seconds": seconds if waits.times else None}


def _by_size(outcome: Outcome) -> list[tuple[tuple[str, str], Waits]]:
    return sorted(outcome.by_kind.items(), key=lambda entry: (-len(entry[1].times) - entry[1].never, entry[0]))


def _show(today: Today, as_is: Outcome, after: Outcome | None) -> None:
    from celery_capacity.platform.console.estimates import span
    from celery_capacity.routing.model.request import alternatives_of, alternatives_text

    console, cluster = facts(), today.cluster
    waiting = len(cluster.waiting) + cluster.beyond
    console.print(
        f"backlog   {waiting:,} waiting, {len(cluster.running):,} running, {as_is.workers} workers admit jobs"
    )
    if cluster.beyond:
        console.print(f"          The first {len(cluster.waiting):,} are simulated; the others come behind them.")
    if cluster.guessed and today.guess:
        console.print(f"          {cluster.guessed:,} run times are unknown, and taken to be {span(today.guess / MS)}.")
    elif cluster.guessed:
        console.print("          No run time is known: give jobs `expected`, or set PLATFORM_LEARN_RUN_TIMES.")
    if as_is.without_reservations or (after is not None and after.without_reservations):
        console.print("          Estimated without reservations, since the cluster is large.")
    if not cluster.waiting:
        console.print("No job waits.")
        return
    outcomes = [as_is, *([after] if after is not None else [])]
    header = ("", *("as it is", "changed")[: len(outcomes)])
    longest = max(outcome.waits.percentile(100) for outcome in outcomes) or 1
    rows = [
        ("policy", *(f"backfill of depth {outcome.rules.depth}" for outcome in outcomes)),
        ("empty in", *(_empty(outcome) for outcome in outcomes)),
        *(
            (f"wait {name}", *(span(outcome.waits.percentile(percent) / MS) for outcome in outcomes))
            for name, percent in (("p50", 50), ("p95", 95), ("max", 100))
        ),
        ("wait mean", *(span(outcome.waits.mean / MS) for outcome in outcomes)),
    ]
    table(console, header, rows, right=())
    console.print()
    shown = [kind for kind, _ in _by_size(as_is)[:SHOWN_KINDS]]
    kinds = {(task, shape): (task or "any", alternatives_text(alternatives_of(shape))) for task, shape in shown}
    _means(console, ("task", "request"), kinds, [outcome.by_kind for outcome in outcomes], longest)
    if as_is.by_tenant:
        console.print()
        sizes = sorted(as_is.by_tenant.items(), key=lambda entry: (-len(entry[1].times) - entry[1].never, entry[0]))
        names = {tenant: (tenant,) for tenant, _ in sizes[:SHOWN_KINDS]}
        _means(console, ("tenant",), names, [outcome.by_tenant for outcome in outcomes], longest)


def _means(
    console: Console,
    titles: Sequence[str],
    rows: Mapping[Any, tuple[str, ...]],
    outcomes: Sequence[Mapping[Any, Waits]],
    longest: int,
) -> None:
    """Print the mean waits of some groups of jobs in each outcome. `rows`: the words of each group."""
    from celery_capacity.platform.console import render

    first = len(titles) + 1
    lines = [
        (*words, str(len(outcomes[0][key].times) + outcomes[0][key].never), *(_mean(waits[key]) for waits in outcomes))
        for key, words in rows.items()
    ]
    meters = {first + n: [(waits[key].mean, longest) for key in rows] for n, waits in enumerate(outcomes)}
    header = (*titles, "jobs", *("mean wait", "changed")[: len(outcomes)])
    render.table_with_bars(console, header, lines, meters, right=(first - 1,))


def _empty(outcome: Outcome) -> str:
    from celery_capacity.platform.console.estimates import span

    empty = outcome.empty_after
    return f"never: {outcome.waits.never:,} jobs do not start" if empty is None else span(empty / MS)


def _mean(waits: Waits) -> str:
    from celery_capacity.platform.console.estimates import span

    return span(waits.mean / MS) if waits.times else "never"
