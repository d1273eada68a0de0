"""Warnings about variables that look like settings and are none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from celery_capacity.routing.config import secret_files

PREFIX = "PLATFORM_"


def warnings_of(environ: Mapping[str, str], variables: Iterable[str]) -> tuple[str, ...]:
    """Return a warning for each PLATFORM_ name that is none of the settings' variables, with the nearest one.

    A slip must not go unseen.
    """
    setting_names = [env for env in variables if env.startswith(PREFIX)]
    bare = [env.removeprefix(PREFIX) for env in setting_names]
    warnings = []
    for name in sorted(environ):
        in_file = name.removesuffix(secret_files.SUFFIX) in secret_files.FROM_FILES
        if name.startswith(PREFIX) and name not in setting_names and not in_file:
            nearest = get_close_matches(name.removeprefix(PREFIX), bare, n=1, cutoff=0.0)
            warnings.append(f"{name} is not a setting and is ignored; the nearest known one is {PREFIX}{nearest[0]}.")
    return tuple(warnings)
