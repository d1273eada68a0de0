"""Search the model of the protocol for a state that breaks an invariant.

    python -m tests.model
    python -m tests.model --without tombstone_until_written --only "a worker crashes"

Each search visits every state that two workers reach within its bounds. It prints the shortest way to the first state
that breaks an invariant. `docs/explanation/model.md` defines a step and lists the omissions.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from rich.console import Console

from tests.model import exhausted
from tests.model.bounds import LARGE, USUAL, without
from tests.model.search import Found, search
from tests.model.state import Rules


def _to_json(found: Found) -> dict[str, Any]:
    return {
        "name": found.bounds.name,
        "jobs": found.bounds.jobs,
        "faults": {name: count for name, count in found.bounds.faults._asdict().items() if count},
        "without": [name for name, kept in found.rules._asdict().items() if not kept],
        "states": found.states,
        "steps": found.steps,
        "depth": found.depth,
        "seconds": round(found.seconds, 2),
        "violation": found.violation or None,
        "steps_to_it": found.trace,
    }


@click.command()
@click.option("--only", multiple=True, help="Search within these bounds alone, by name. May be given more than once.")
@click.option("--without", "dropped", multiple=True, help="Leave out this rule of the protocol.")
@click.option("--large", is_flag=True, help="Search within larger bounds too: a quarter of an hour and 4 GB.")
@click.option("--store", is_flag=True, help="Keep the sizes of the usual searches for the tests, if nothing is wrong.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(only: tuple[str, ...], dropped: tuple[str, ...], large: bool, store: bool, as_json: bool) -> None:
    """Visit every state of the protocol's model, and print the first that must not be."""
    by_name = {bounds.name: bounds for bounds in LARGE}
    if unknown := [name for name in dropped if name not in Rules._fields]:
        raise click.BadParameter(f"there is no rule {unknown[0]}; rules: {', '.join(Rules._fields)}")
    if unknown := [name for name in only if name not in by_name]:
        raise click.BadParameter(f"there is no search {unknown[0]!r}; searches: {'; '.join(by_name)}")
    if store and (only or dropped or large):
        raise click.BadParameter("--store keeps the usual searches, all of them and with all rules")
    chosen = [by_name[name] for name in only] or list(LARGE if large else USUAL)
    talk, results = Console(stderr=True, highlight=False), list[Found]()
    for number, bounds in enumerate(chosen, 1):
        with talk.status(bounds.name) as status:

            def progress(visited: int, waiting: int, text: str = f"{number} of {len(chosen)}: {bounds.name}") -> None:
                status.update(f"{text}: {visited:,} states visited, {waiting:,} known beside them")

            results.append(search(bounds, without(*dropped), progress))
        if not as_json:
            _show(results[-1])
    violations = sum(bool(result.violation) for result in results)
    if store and not violations:
        exhausted.store(results)
    if as_json:
        click.echo(
            json.dumps({"violations": violations, "searches": [_to_json(result) for result in results]}, indent=2)
        )
    else:
        states, seconds = sum(result.states for result in results), sum(result.seconds for result in results)
        verdict = f"{violations} violations" if violations else "nothing is wrong"
        click.echo(f"{states:,} states in {seconds:.0f} s of CPU: {verdict}")
    sys.exit(1 if violations else 0)


def _show(found: Found) -> None:
    size = f"{found.states:>9,} states {found.steps:>10,} steps {found.depth:>4} deep {found.seconds:>6.1f} s"
    click.echo(f"{size}  {found.bounds.name}")
    if found.violation:
        click.echo(f"  {found.violation}")
        for number, line in enumerate(found.trace, 1):
            click.echo(f"  {number:>3}. {line}")


if __name__ == "__main__":
    main()
