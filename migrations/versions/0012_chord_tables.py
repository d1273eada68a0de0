"""The function `note_chord` uses the platform's tables, whatever its caller has put in front of them.

The function runs with its owner's rights. With a temporary table `chords`, a caller could otherwise run a trigger of
its own with these rights.
"""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_SIGNATURE = "note_chord(text, integer, text)"


def upgrade() -> None:
    op.execute(
        f"DO $$ BEGIN EXECUTE format('ALTER FUNCTION {_SIGNATURE} SET search_path = %I, pg_temp', current_schema());"
        " END $$"
    )


def downgrade() -> None:
    op.execute(f"ALTER FUNCTION {_SIGNATURE} RESET search_path")
