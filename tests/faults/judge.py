"""Judge the recorded history of a run once more: `python -m tests.faults.judge FILE`.

The exit code is 0 if all counts are 0. Otherwise it is 1, and the jobs concerned follow.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from tests.faults.judging import history
from tests.faults.judging.oracle import COUNTS, judge


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--most", default=8, show_default=True, help="Lines for each count.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(file: Path, most: int, as_json: bool) -> None:
    """Count what must not be in the history FILE that `make chaos` wrote."""
    try:
        records = history.read(file)
        verdict = judge(history.evidence(records))
    except (ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{file} is no history of a run: {error!r}") from error
    jobs = sum(record["what"] == "submit" for record in records)
    if as_json:
        lines_of = {name: lines for name, lines in verdict.found.items() if lines}
        click.echo(json.dumps({"submissions": jobs, "counts": verdict.counts, "found": lines_of}, indent=2))
    else:
        click.echo(f"{file}: {jobs} submissions")
        for name, count in verdict.counts.items():
            click.echo(f"{name:<16}{count:>6}  {COUNTS[name]}")
        for line in verdict.lines(most):
            click.echo(line)
    sys.exit(0 if verdict.zeros else 1)


if __name__ == "__main__":
    main()
