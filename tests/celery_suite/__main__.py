"""Run Celery's own integration suite with plain Celery and with apps of the platform, and compare the results.

    make test-celery CELERY=/path/to/celery
    python -m tests.celery_suite /path/to/celery t/integration/test_inspect.py

The checkout has the tag of the installed version. The differences that are there on purpose are in `on_purpose.toml`.
The command ends with 1 for any other difference, and with 2 for a wrong checkout.
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import celery
import click

from tests.celery_suite import running
from tests.celery_suite.comparing import Result, Table, compare, read_purposes

#: Characters of an error that are shown.
ERROR_LENGTH: Final = 1500
#: Times that a test that differs is run again.
MAX_REPEATS: Final = 3
#: Columns of the table behind the name of the file.
COLUMNS: Final = ("passed", "skipped", "failed with Celery too", "on purpose", "not listed")


@click.command(help=__doc__)
@click.argument("checkout", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("files", nargs=-1)
@click.option("--without-plain", is_flag=True, help="Do not run plain Celery beside: each failure is a difference.")
def main(checkout: Path, files: tuple[str, ...], without_plain: bool) -> None:
    check_version(checkout)
    purposes = read_purposes()

    def say(line: str) -> None:
        click.echo(line, err=True)

    with ThreadPoolExecutor(2) as threads:
        platform = threads.submit(running.run_all, checkout, files, say, on_platform=True)
        plain = None if without_plain else threads.submit(running.run_all, checkout, files, say, on_platform=False)
        results, beside = platform.result(), None if plain is None else plain.result()
    tables = compare(results, beside, purposes)
    if differing := [result.test for table in tables.values() for result in table.differing]:
        say(f"{len(differing)} tests that differ are run again: {', '.join(differing)}")
        again = run_again(checkout, differing)
        tables = compare([again.get(result.test, result) for result in results], beside, purposes)
    total = Table()
    for table in tables.values():
        total.add(table)
    show({**tables, "in all": total})
    if total.not_needed:
        click.echo("\nListed as on purpose, and passed:\n  " + "\n  ".join(total.not_needed))
    for result in total.differing:
        click.echo(f"\nNot listed: {result.test}\n{result.error[-ERROR_LENGTH:]}")
    sys.exit(1 if total.differing else 0)


def check_version(checkout: Path) -> None:
    """Raise a usage error for a folder without Celery's suite, or with that of another version."""
    if not (checkout / running.SUITE / "conftest.py").is_file():
        raise click.UsageError(f"{checkout} has no {running.SUITE}: give a checkout of Celery, or its unpacked sdist.")
    match = re.search(r"__version__ = '([^']+)'", (checkout / "celery" / "__init__.py").read_text())
    version = match.group(1) if match else "unknown"
    if version != celery.__version__:
        raise click.UsageError(
            f"{checkout} is Celery {version}, and {celery.__version__} is installed: check out v{celery.__version__}."
        )


def run_again(checkout: Path, tests: list[str]) -> dict[str, Result]:
    """Run tests again until each has passed or failed so often, and return the last results by name.

    Some give 42 jobs a second to end, for which a busy machine is too slow. A difference fails each time.
    """
    results: dict[str, Result] = {}
    with running.prepared(checkout, on_platform=True) as run:
        for _ in range(MAX_REPEATS):
            left = [test for test in tests if test not in results or results[test].outcome == "failed"]
            results |= {result.test: result for test in left for result in run.results([test])}
    return results


def show(tables: dict[str, Table]) -> None:
    """Print a row for each file."""
    width = max(map(len, tables))
    click.echo(f"\n{'file':<{width}}" + "".join(f"  {column:>{len(column)}}" for column in COLUMNS))
    for name, table in tables.items():
        numbers = (table.passed, table.skipped, table.plain, table.on_purpose, len(table.differing))
        cells = "".join(f"  {number:>{len(column)}}" for number, column in zip(numbers, COLUMNS, strict=True))
        click.echo(f"{name:<{width}}{cells}")


if __name__ == "__main__":
    main()
