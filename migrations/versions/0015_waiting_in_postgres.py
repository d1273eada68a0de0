"""The column `jobs.behind` names the shape of a waiting job that stays in Postgres, behind the head of the backlog."""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        ALTER TABLE jobs ADD COLUMN behind TEXT;
        COMMENT ON COLUMN jobs.behind IS
          'the shape under which it waits in Postgres alone, behind the jobs that Redis holds; null: it does not';
        CREATE INDEX jobs_behind ON jobs (behind, (- priority), seq) WHERE behind IS NOT NULL AND state = 'waiting';
        """
    )


def downgrade() -> None:
    op.execute("DROP INDEX jobs_behind")
    op.drop_column("jobs", "behind")
