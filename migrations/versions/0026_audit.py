"""The table `audit`: who ordered what, when, by which way, and what became of it."""

from __future__ import annotations

from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE audit (
          seq BIGINT GENERATED ALWAYS AS IDENTITY,
          action TEXT NOT NULL,
          targets TEXT[] NOT NULL,
          number INTEGER NOT NULL,
          made_by TEXT NOT NULL,
          via TEXT NOT NULL,
          made_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
          details JSONB,
          outcome TEXT,
          ended_at TIMESTAMP WITH TIME ZONE,
          PRIMARY KEY (seq)
        );
        CREATE INDEX audit_made_at ON audit (made_at);
        COMMENT ON COLUMN audit.seq IS 'order in which the actions began';
        COMMENT ON COLUMN audit.action IS 'such as cancel, retry, drain, pause or submit';
        COMMENT ON COLUMN audit.targets IS 'ids of jobs, names of workers or parts of the backlog: the first 100';
        COMMENT ON COLUMN audit.number IS 'of all targets';
        COMMENT ON COLUMN audit.made_by IS 'user@host, the user that a proxy named, or the role and the address';
        COMMENT ON COLUMN audit.via IS 'api or cli';
        COMMENT ON COLUMN audit.made_at IS 'when the action began; it is kept for PLATFORM_KEEP_AUDIT from then on';
        COMMENT ON COLUMN audit.details IS 'what else was given, and of many targets how many had which result';
        COMMENT ON COLUMN audit.outcome IS 'done, partly or refused; null: under way, or its process was ended';
        COMMENT ON COLUMN audit.ended_at IS 'when the outcome was known';
        """
    )


def downgrade() -> None:
    op.drop_table("audit")
