"""A question to the user before an action that cannot be undone."""

from __future__ import annotations

import sys

import click

from celery_capacity.routing.errors import PlatformError


class Declined(PlatformError):
    """The user declined the change, or there was nobody to ask."""

    reference = "declined"
    title = "it was not wanted"


def confirm(question: str, option: str = "--yes") -> None:
    """Ask before an action. Raise `Declined` unless the answer is yes, or without a terminal.

    `option` of the command line answers beforehand.
    """
    advice = f"{option} does it without asking."
    if sys.stdin is None or not sys.stdin.isatty():
        raise Declined(f"{question} There is no terminal to ask on: nothing was changed", advice=advice)
    try:
        agreed = click.confirm(question, err=True)
    except click.Abort:  # end of the input
        agreed = False
    if not agreed:
        raise Declined("nothing was changed", advice=advice)
