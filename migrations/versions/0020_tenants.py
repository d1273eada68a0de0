"""The table `tenants`: the rules by which tenants share the workers."""

from __future__ import annotations

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        r"""
        CREATE TABLE tenants (
          name TEXT NOT NULL,
          weight INTEGER DEFAULT 1 NOT NULL,
          nominal JSONB DEFAULT '{}' NOT NULL,
          quota JSONB DEFAULT '{}' NOT NULL,
          max_waiting INTEGER DEFAULT 0 NOT NULL,
          made_by TEXT NOT NULL,
          made_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
          PRIMARY KEY (name),
          CONSTRAINT tenants_weight_positive CHECK (weight > 0),
          CONSTRAINT tenants_max_waiting_positive CHECK (max_waiting >= 0)
        );
        COMMENT ON COLUMN tenants.nominal IS
          'amounts that are its own by resource, which others may borrow while it does not need them';
        COMMENT ON COLUMN tenants.quota IS 'amounts that its jobs never hold more of';
        COMMENT ON COLUMN tenants.max_waiting IS 'waiting jobs from which on a submission is refused; 0: no limit';
        COMMENT ON COLUMN tenants.made_by IS 'user@host of the operator, or the name that was given';
        CREATE INDEX jobs_tenants ON jobs (substring(shape FROM ',\$([^,]+)'), (- priority), seq)
          WHERE state IN ('accepted', 'waiting') AND shape LIKE '%,$%';
        COMMENT ON COLUMN operator_actions.action IS
          'cordon, uncordon, drain, pause, resume, priority, tenant or remove-tenant';
        COMMENT ON COLUMN operator_actions.target IS
          'a worker; platform, queue:NAME or task:NAME; tenant:NAME; or the id of a job';
        """
    )


def downgrade() -> None:
    op.execute("DROP INDEX jobs_tenants")
    op.drop_table("tenants")
