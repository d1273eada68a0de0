"""Where a worker's pid counts, and when its process started by the kernel's monotonic clock.

Two columns without a default: rows of a release before have none, and no process of this one takes such a worker for
dead because of its pid.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "workers", sa.Column("machine_id", sa.Text, comment="a digest of the machine's id; null: an older release")
    )
    op.add_column("workers", sa.Column("start_ticks", sa.BigInteger, comment="clock ticks from the boot to its start"))
    op.alter_column("workers", "boot_id", comment="the boot, and the namespaces in which its pid and ticks count")


def downgrade() -> None:
    op.alter_column("workers", "boot_id", comment=None)
    op.drop_column("workers", "start_ticks")
    op.drop_column("workers", "machine_id")
