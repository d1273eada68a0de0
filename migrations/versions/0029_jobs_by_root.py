"""Indexes of the jobs that others published, by their root: the page of a job draws its whole workflow.

A job that is its own root, as each one without a canvas, is in neither index, so its insert and its changes cost the
same as before. The archive comes first: an index locks out writes to its table until the end of the transaction, and
that of `jobs` shall be short.
"""

from __future__ import annotations

from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE INDEX jobs_archive_root ON jobs_archive (root_id, seq) WHERE root_id <> id;
        CREATE INDEX jobs_root ON jobs (root_id, seq) WHERE root_id <> id;
        """
    )


def downgrade() -> None:
    op.execute("DROP INDEX jobs_root; DROP INDEX jobs_archive_root")
