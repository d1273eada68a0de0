"""Jobs, attempts, workers, the authority row and declarations.

Written out in full and not made from `routing.tables`: a revision must go on doing what it did when it was
applied. A test compares the result with `routing.tables`.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_STATES = (
    "'accepted', 'waiting', 'scheduled', 'admitted', 'running', 'replaced', "
    "'succeeded', 'failed', 'cancelled', 'expired', 'lost'"
)
_FINAL = "'cancelled', 'expired', 'failed', 'lost', 'succeeded'"


def _time(name: str, comment: str | None = None) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), comment=comment)


def _past(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()"))


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.Text, primary_key=True, comment="the Celery task id"),
        sa.Column("seq", sa.BigInteger, sa.Identity(), nullable=False, comment="order of submission"),
        sa.Column("name", sa.Text, nullable=False, comment="name of the task"),
        sa.Column("state", sa.Text, nullable=False, comment="see routing.states"),
        sa.Column("epoch", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column(
            "attempt", sa.Integer, nullable=False, server_default=sa.text("0"), comment="admissions so far"
        ),
        sa.Column(
            "step",
            sa.SmallInteger,
            nullable=False,
            server_default=sa.text("0"),
            comment="see routing.states.Step",
        ),
        sa.Column(
            "losses",
            sa.SmallInteger,
            nullable=False,
            server_default=sa.text("0"),
            comment="attempts lost after a claim",
        ),
        sa.Column("worker", sa.Text, comment="the worker of the newest attempt"),
        sa.Column("incarnation", sa.Text),
        sa.Column(
            "priority",
            sa.SmallInteger,
            nullable=False,
            server_default=sa.text("0"),
            comment="0 to 9, higher first",
        ),
        sa.Column("request", JSONB, nullable=False, comment="people's units: {cpus, memory, slots, ...}"),
        sa.Column("shape", sa.Text, nullable=False, comment="the request in integers, see routing.request"),
        sa.Column(
            "declared",
            sa.Boolean,
            nullable=False,
            server_default=sa.text("true"),
            comment="false: the task was unknown",
        ),
        sa.Column("queue", sa.Text, nullable=False, comment="the queue that the sender named"),
        sa.Column(
            "message", sa.LargeBinary, nullable=False, comment="the whole Celery message, see routing.message"
        ),
        sa.Column("retries", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column(
            "nesting",
            sa.Integer,
            nullable=False,
            server_default=sa.text("0"),
            comment="replaced_task_nesting",
        ),
        sa.Column("root_id", sa.Text),
        sa.Column("parent_id", sa.Text),
        _past("submitted_at"),
        _time("due_at", "must not start before"),
        _time("expires_at", "must not start after"),
        _time("admitted_at", "of the newest attempt"),
        _time("started_at", "of the newest attempt"),
        _time("finished_at"),
        sa.Column("error", sa.Text),
        sa.Column("successor", sa.LargeBinary),
        sa.Column("successor_shape", sa.Text),
        sa.Column("successor_request", JSONB),
        sa.Column("successor_retries", sa.Integer),
        sa.Column("successor_nesting", sa.Integer),
        sa.Column("successor_priority", sa.SmallInteger),
        _time("successor_due_at"),
        _time("successor_expires_at"),
        sa.CheckConstraint(f"state IN ({_STATES})", name="jobs_state_known"),
        sa.CheckConstraint("priority BETWEEN 0 AND 9", name="jobs_priority_range"),
        sa.CheckConstraint(
            f"(finished_at IS NOT NULL) = (state IN ({_FINAL}))", name="jobs_finished_when_final"
        ),
    )
    op.create_index("jobs_state_seq", "jobs", ["state", "seq"])
    op.create_index("jobs_due", "jobs", ["due_at"], postgresql_where=sa.text("state = 'scheduled'"))
    op.create_index(
        "jobs_expiring",
        "jobs",
        ["expires_at"],
        postgresql_where=sa.text("expires_at IS NOT NULL AND state IN ('accepted', 'waiting', 'scheduled')"),
    )
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("incarnation", sa.Text, nullable=False),
        _time("admitted_at"),
        _time("started_at"),
        _time("ended_at"),
        sa.Column("outcome", sa.Text, comment="a final state, retried, handed_back, taken_back or lost"),
        sa.Column("error", sa.Text),
    )
    op.create_table(
        "workers",
        sa.Column("incarnation", sa.Text, primary_key=True, comment="one life of a worker"),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("cpus", sa.BigInteger, nullable=False, comment="millicores"),
        sa.Column("memory", sa.BigInteger, nullable=False, comment="bytes"),
        sa.Column("capacity", JSONB, nullable=False, comment="people's units: {cpus, memory, slots, ...}"),
        sa.Column("status", sa.Text, nullable=False, comment="ready, draining, left or lost"),
        sa.Column("hostname", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("boot_id", sa.Text, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        _time("left_at"),
        sa.CheckConstraint("status IN ('ready', 'draining', 'left', 'lost')", name="workers_status_known"),
    )
    op.create_index("workers_name", "workers", ["name", "started_at"])
    op.create_index(
        "workers_live", "workers", ["name"], postgresql_where=sa.text("status IN ('ready', 'draining')")
    )
    authority = op.create_table(
        "authority",
        sa.Column("only", sa.Boolean, primary_key=True, server_default=sa.text("true")),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("authority", sa.Text, nullable=False, comment="which store admits: ledger or postgres"),
        _past("changed_at"),
        sa.CheckConstraint('"only"', name="authority_one_row"),
        sa.CheckConstraint("authority IN ('ledger', 'postgres')", name="authority_known"),
    )
    op.bulk_insert(authority, [{"epoch": 1, "authority": "ledger"}])
    op.create_table(
        "declarations",
        sa.Column("name", sa.Text, primary_key=True, comment="name of a task"),
        sa.Column("request", JSONB, nullable=False, comment="people's units"),
        _past("seen_at"),
    )


def downgrade() -> None:
    for table in ("declarations", "authority", "workers", "attempts", "jobs"):
        op.drop_table(table)
