"""Ids of jobs as people type them: whole or by their beginning, completed by the shell, and unknown ones refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from celery_capacity.platform.console.command import problem_of_store
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.model.identifiers import check_job_id

if TYPE_CHECKING:
    import click
    from sqlalchemy import Connection, Engine

#: Newest jobs whose ids the completion of a shell offers.
COMPLETED: Final = 50
#: Ids that an error names.
SHOWN_IDS: Final = 5


class UnknownJob(InvalidRequest):
    """No job has this id, or several ids begin so."""

    reference = "unknown-job"
    title = "there is no such job"
    status = 404


def whole_ids(engine: Engine, typed: Sequence[str], *, exact: bool = False) -> list[str]:
    """Return the ids, each once. The beginning of one id stands for it, unless `exact`.

    Raises `UnknownJob`, `InvalidRequest`.
    """
    from celery_capacity.routing.inspect import job_lookup
    from celery_capacity.routing.recovery import revocation

    jobs = list(dict.fromkeys(check_job_id(job) for job in typed))
    with engine.connect() as connection:
        existing = revocation.standing(connection, jobs)
        begun = [job for job in jobs if not exact and job not in existing]
        ids = {job: [job] if job in existing else [] for job in jobs}
        ids |= {job: job_lookup.with_prefix(connection, job) for job in begun}
        for job, candidates in ids.items():
            if len(candidates) > 1:
                advice = f"Type more of the id. Some of them: {', '.join(candidates)}."
                raise UnknownJob(f"more than one job id begins with {job}", value=job, advice=advice)
        if unknown := [job for job, candidates in ids.items() if not candidates]:
            raise unknown_jobs(connection, unknown)
    return list(dict.fromkeys(candidates[0] for candidates in ids.values()))


def unknown_jobs(connection: Connection, jobs: Sequence[str]) -> UnknownJob:
    """Return the error for ids that no job has. It names the ids that may be meant."""
    from celery_capacity.routing.inspect import job_lookup

    near = job_lookup.nearest(connection, jobs[0])
    more = f" and {len(jobs) - SHOWN_IDS} more" if len(jobs) > SHOWN_IDS else ""
    advice = f"The nearest: {', '.join(near)}." if near else "`celery -A platform jobs` lists the newest."
    return UnknownJob(f"there is no job {', '.join(jobs[:SHOWN_IDS])}{more}", value=jobs[0], advice=advice)


def complete_id(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return ids for the completion of a shell: of the newest jobs, or those that begin so; none without stores."""
    from celery_capacity.routing.inspect import job_list, job_lookup
    from celery_capacity.workers.process.stores import Stores

    try:
        with Stores().engine.connect() as connection:
            if len(incomplete) >= job_lookup.SHORTEST_PREFIX:
                return job_lookup.with_prefix(connection, incomplete)
            lines = job_list.newest(connection, job_list.JobFilter(), COMPLETED).lines
    except Exception as error:
        if problem_of_store(error) is None:
            raise
        return []  # a shell has no place for a message
    return [str(line["id"]) for line in lines if str(line["id"]).startswith(incomplete)]
