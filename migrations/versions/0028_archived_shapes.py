"""The shape of an archived job, and the options of a task beside the amounts that it declares."""

from __future__ import annotations

from pathlib import Path

from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _run("up")


def downgrade() -> None:
    _run("down")


def _run(direction: str) -> None:
    statements = Path(__file__).with_name(f"{revision}_{direction}.sql").read_text(encoding="utf-8")
    # The driver takes a percent sign for a placeholder of a value.
    op.get_bind().exec_driver_sql(statements.replace("%", "%%"))
