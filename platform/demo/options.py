"""Options of the commands that replay or simulate a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from celery_capacity.platform.demo import trace
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.identifiers import check_tenant
from celery_capacity.routing.policy.tenants import MAX_WEIGHT


def parse_scale(_context: click.Context, _parameter: click.Parameter, text: str | None) -> float | None:
    """Return the value of `--scale`, None where it is not given."""
    try:
        return None if text is None else trace.parse_scale(text)
    except InvalidRequest as error:
        raise click.BadParameter(str(error)) from error


def parse_tenants(_context: click.Context, _parameter: click.Parameter, texts: Sequence[str]) -> dict[str, int]:
    """Return the weights that `--tenant NAME=WEIGHT` names, by tenant."""
    weights: dict[str, int] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            check_tenant(name)
        except InvalidRequest as error:
            raise click.BadParameter(str(error)) from error
        if not (number.isascii() and number.isdigit() and 1 <= int(number) <= MAX_WEIGHT):
            raise click.BadParameter(f"{text!r} is not NAME=WEIGHT. Give a weight from 1 to {MAX_WEIGHT}: physics=2.")
        if name in weights:
            raise click.BadParameter(f"the tenant {name} stands there twice.")
        weights[name] = int(number)
    return weights


#: A file with a trace; None where it is not given.
trace_option: Final = click.option(
    "--trace",
    "path",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV of jobs, instead of the packaged trace.",
)
scale_option: Final = click.option(
    "--scale", metavar="N", callback=parse_scale, help="How many times faster than the trace."
)
log_option: Final = click.option(
    "--log",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write job,start,end,worker as CSV.",
)
tenants_option: Final = click.option(
    "--tenant",
    "weights",
    metavar="NAME=WEIGHT",
    multiple=True,
    callback=parse_tenants,
    help="A tenant's weight; again for more.",
)
