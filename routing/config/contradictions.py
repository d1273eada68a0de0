"""Settings that are out of range, that contradict one another, or that are none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from celery_capacity.routing.config import secret_files, setting_values
from celery_capacity.routing.config.meaning import Meaning

PREFIX = "PLATFORM_"

#: seconds, the longest time that makes sense in any setting: a year
MAX_SECONDS = 31_536_000.0
#: seconds, the shortest: Redis counts in milliseconds
MIN_SECONDS = 0.001
#: bytes, above which neither Redis (512 MiB a value) nor a row should hold a message
MAX_MESSAGE_LIMIT = 512 * 1024**2
#: lost attempts after which a job ends at the latest; a column of Postgres counts them
MAX_LOSSES_LIMIT = 1000

#: times that may be longer than `MAX_SECONDS`: records are kept for decades
LONG = {"keep_archived": 100 * MAX_SECONDS, "keep_audit": 100 * MAX_SECONDS}


def contradictions(values: Mapping[str, Any], described: Iterable[tuple[str, Meaning]]) -> list[str]:
    """Return a sentence for each value that is out of range or contradicts another one.

    `described`: each setting with its meaning. Settings that are missing from `values` are not judged.
    """
    wrong = []
    values = dict(values)
    for name, meaning in described:
        least = 0.0 if name in setting_values.ZERO and values.get(name) == 0 else MIN_SECONDS
        most = LONG.get(name, MAX_SECONDS)
        if meaning.parse is setting_values.seconds and name in values and not least <= values[name] <= most:
            seconds = values.pop(name)  # its relations to others say nothing more
            zero = f", or 0 for {setting_values.ZERO[name]}" if name in setting_values.ZERO else ""
            wrong.append(f"{meaning.env}={seconds} must be from {MIN_SECONDS:g} to {most:.0f} seconds{zero}.")
    if "max_message" in values and not 0 < values["max_message"] <= MAX_MESSAGE_LIMIT:
        wrong.append(f"PLATFORM_MAX_MESSAGE={values['max_message']} must be from 1 to {MAX_MESSAGE_LIMIT} bytes.")
    if "most_losses" in values and not 1 <= values["most_losses"] <= MAX_LOSSES_LIMIT:
        wrong.append(f"PLATFORM_MOST_LOSSES={values['most_losses']} must be from 1 to {MAX_LOSSES_LIMIT} attempts.")
    if {"redis_url", "database_url"} <= values.keys() and (values["redis_url"] is None) != (
        values["database_url"] is None
    ):
        there, missing = ("REDIS_URL", "DATABASE_URL") if values["redis_url"] else ("DATABASE_URL", "REDIS_URL")
        wrong.append(f"{there} is set and {missing} is not: set both, or neither to use embedded servers.")
    if {"renew_interval", "worker_ttl"} <= values.keys() and not values["renew_interval"] < values["worker_ttl"]:
        wrong.append(
            f"PLATFORM_RENEW_INTERVAL={values['renew_interval']:g} must be below"
            f" PLATFORM_WORKER_TTL={values['worker_ttl']:g}: a worker would expire between two renewals."
        )
    if {"worker_ttl", "lost_after"} <= values.keys() and not values["worker_ttl"] <= values["lost_after"]:
        wrong.append(
            f"PLATFORM_LOST_AFTER={values['lost_after']:g} must not be below"
            f" PLATFORM_WORKER_TTL={values['worker_ttl']:g}: jobs would be taken from a worker that is alive."
        )
    wrong += _of_tokens(values)
    return wrong


def _of_tokens(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the tokens of the dashboard. No sentence shows one."""
    viewer = values.get("viewer_token")
    if viewer is None or "token" not in values:
        return []
    if values["token"] is None:
        return ["PLATFORM_VIEWER_TOKEN is set and PLATFORM_TOKEN is not: operators need a token of their own."]
    if values["token"] == viewer:
        return ["PLATFORM_VIEWER_TOKEN equals PLATFORM_TOKEN: viewers could act."]
    return []


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
