"""The tables before the first release, and the functions that run with their owner's rights.

They are written as SQL, since a revision must always do the work that it did when it was applied. The revision's number
is that of the last of the revisions that it replaces.
"""

from __future__ import annotations

from pathlib import Path

from alembic import op

revision = "0011"
down_revision = None
branch_labels = None
depends_on = None

_FUNCTIONS = (
    "archive_finished(double precision, integer)",
    "claim_key(text, text, double precision)",
    "gate_job(text, text[], boolean, timestamptz)",
    "open_rate(text, double precision, text, double precision, integer)",
    "note_chord(text, integer, text)",
)
_TABLES = (
    "jobs", "attempts", "jobs_archive", "attempts_archive", "workers", "authority", "declarations", "quarantine",
    "runner", "unique_keys", "dependencies", "rates", "chords", "chord_parts",
)  # fmt: skip


def upgrade() -> None:
    for name in ("tables", "functions"):
        statements = Path(__file__).with_name(f"{revision}_{name}.sql").read_text(encoding="utf-8")
        # The driver takes a percent sign for a placeholder of a value.
        op.get_bind().exec_driver_sql(statements.replace("%", "%%"))


def downgrade() -> None:
    """Drop everything, with every job."""
    for table in _TABLES:
        op.drop_table(table)
    for function in (*_FUNCTIONS, "note_awaited_end()"):
        op.execute(f"DROP FUNCTION {function}")
