"""Names of the tables and columns from which queries are built. The revisions in `migrations` define the tables.

A test compares these names with the tables that the revisions make. docs/reference/tables.md has the meaning of each
column. The JSON columns that people read (`jobs.request`, `workers.capacity`) are in people's units: CPUs as numbers,
memory in bytes. Elsewhere CPUs are millicores.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import TableClause, column, table

#: Channel of Postgres on which a process announces that it left a job for the pulling workers.
CHANNEL: Final = "celery_capacity_backlog"


def _table(name: str, columns: str) -> TableClause:
    return table(name, *map(column, columns.split()))


#: Columns that a job and an archived job have in common.
_JOB: Final = (
    "seq id name state epoch attempt losses worker incarnation priority request declared queue retries nesting root_id "
    "parent_id submitted_at due_at expires_at admitted_at started_at finished_at error shape expected_ms"
)
_ATTEMPT: Final = "epoch attempt worker incarnation admitted_at started_at ended_at outcome error"

jobs: Final = _table("jobs", f"{_JOB} message needs not_before progress")
attempts: Final = _table("attempts", f"job_id {_ATTEMPT}")
jobs_archive: Final = _table("jobs_archive", f"{_JOB} message_bytes archived_at")
attempts_archive: Final = _table("attempts_archive", f"job_seq {_ATTEMPT}")
workers: Final = _table(
    "workers",
    "incarnation name capacity status hostname pid version started_at seen_at left_at ledger_lost_at ends_at labels",
)
retries: Final = _table("retries", "seq job of_seq of_job made_at")
quarantine: Final = _table("quarantine", "id raw queue reason worker seen_at")
rates: Final = _table("rates", "name said")
authority: Final = _table("authority", "epoch authority")
