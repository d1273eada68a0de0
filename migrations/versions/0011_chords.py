"""Chords that are counted in Postgres, since the Redis that counts them was away when they were made.

Whoever only submits makes chords too: a function with its owner's rights notes them. A worker of the version before
neither notes nor counts one here; its part stays with its job until a newer worker delivers it.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_NOTE = """
CREATE FUNCTION note_chord(noted text, parts integer, shape text) RETURNS void
LANGUAGE sql SECURITY DEFINER AS $$
  INSERT INTO chords (group_id, size, structure) VALUES (noted, parts, shape)
  ON CONFLICT (group_id) DO UPDATE SET size = coalesce(excluded.size, chords.size),
    structure = coalesce(excluded.structure, chords.structure)
$$
"""


def _made_at() -> sa.Column[Any]:
    now = sa.text("clock_timestamp()")
    return sa.Column("made_at", sa.DateTime(timezone=True), nullable=False, server_default=now)


def upgrade() -> None:
    op.create_table(
        "chords",
        sa.Column("group_id", sa.Text, primary_key=True, comment="Celery's id of its header"),
        sa.Column("size", sa.Integer, comment="parts of its header; null: not known yet"),
        sa.Column("structure", sa.Text, comment="the nested results of its header as JSON; null: none are nested"),
        _made_at(),
    )
    op.create_table(
        "chord_parts",
        sa.Column("group_id", sa.Text, primary_key=True),
        sa.Column("member", sa.Text, primary_key=True, comment="the job and its place in the header"),
        sa.Column("position", sa.Float(53), nullable=False, comment="its place in the header"),
        sa.Column("outcome", sa.LargeBinary, nullable=False, comment="its state and value, encoded"),
        _made_at(),
    )
    op.execute(_NOTE)


def downgrade() -> None:
    op.execute("DROP FUNCTION note_chord(text, integer, text)")
    op.drop_table("chord_parts")
    op.drop_table("chords")
