"""The tables in Postgres, the durable truth of the platform (SQLAlchemy Core; changed by the migrations).

Units: CPUs in millicores, memory in bytes, times with time zone. The JSON columns that people read (`jobs.request`,
`workers.capacity`) are in people's units: CPUs as numbers, memory in bytes.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Float,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from celery_capacity.routing.model.states import FINAL, State

#: Channel of Postgres on which a process announces that it left a job for the pulling workers.
CHANNEL = "celery_capacity_backlog"
metadata = MetaData()

_states = ", ".join(f"'{state.value}'" for state in State)
_final = ", ".join(f"'{state.value}'" for state in sorted(FINAL))

jobs = Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True, comment="the Celery task id"),
    Column("seq", BigInteger, Identity(), nullable=False, comment="order of submission"),
    Column("name", Text, nullable=False, comment="name of the task"),
    Column("state", Text, nullable=False, comment="see routing.model.states"),
    # The token of the newest attempt is (epoch, attempt); step ranks the events inside that attempt.
    # A write is accepted only when (epoch, attempt, step) grows: an attempt that lost its lease cannot speak.
    Column("epoch", BigInteger, nullable=False, server_default=text("0")),
    Column("attempt", Integer, nullable=False, server_default=text("0"), comment="admissions so far"),
    Column("step", SmallInteger, nullable=False, server_default=text("0"), comment="see routing.model.states.Step"),
    Column(
        "losses",
        SmallInteger,
        nullable=False,
        server_default=text("0"),
        comment="attempts lost after a claim",
    ),
    Column("worker", Text, comment="the worker of the newest attempt"),
    Column("incarnation", Text),
    Column("priority", SmallInteger, nullable=False, server_default=text("0"), comment="0 to 9, higher first"),
    Column("request", JSONB, nullable=False, comment="people's units: {cpus, memory, slots, ...}"),
    Column("shape", Text, nullable=False, comment="the request in integers, see routing.model.request"),
    Column(
        "declared",
        Boolean,
        nullable=False,
        server_default=text("true"),
        comment="false: the task was unknown",
    ),
    Column("queue", Text, nullable=False, comment="the queue that the sender named"),
    Column("message", LargeBinary, nullable=False, comment="the whole Celery message, see routing.model.message"),
    Column(
        "rerun",
        Boolean,
        nullable=False,
        server_default=text("true"),
        comment="false: its first lost attempt ends it",
    ),
    Column("outbox", Text, comment="what its end left to be delivered, see routing.model.outbox"),
    Column("retries", Integer, nullable=False, server_default=text("0")),
    Column("nesting", Integer, nullable=False, server_default=text("0"), comment="replaced_task_nesting"),
    Column("root_id", Text),
    Column("parent_id", Text),
    Column("replaces", Text, comment="the job in whose replacement this is a step"),
    Column("submitted_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Column("due_at", DateTime(timezone=True), comment="must not start before"),
    Column("expires_at", DateTime(timezone=True), comment="must not start after"),
    Column("admitted_at", DateTime(timezone=True), comment="of the newest attempt"),
    Column("started_at", DateTime(timezone=True), comment="of the newest attempt"),
    Column("finished_at", DateTime(timezone=True)),
    Column("error", Text),
    # A job that was revoked while a worker held it ends when it comes back from there.
    Column("revoked_at", DateTime(timezone=True), comment="when it was revoked, if it had been admitted"),
    Column("stamps", JSONB, comment="its stamped headers: {name: [values]}; null: none"),
    # A publish under the id of a running attempt (retry, replace) waits here until that attempt ends.
    Column("successor", LargeBinary),
    Column("successor_shape", Text),
    Column("successor_request", JSONB),
    Column("successor_name", Text),
    Column("successor_rerun", Boolean),
    Column("successor_retries", Integer),
    Column("successor_nesting", Integer),
    Column("successor_priority", SmallInteger),
    Column("successor_due_at", DateTime(timezone=True)),
    Column("successor_expires_at", DateTime(timezone=True)),
    # Constraints (`routing.store.dependencies`): a constrained job is scheduled without a time.
    Column("awaited", Boolean, nullable=False, server_default=text("false"), comment="another job waits for its end"),
    Column("needs", Integer, nullable=False, server_default=text("0"), comment="jobs that it waits for"),
    Column("rated", Boolean, nullable=False, server_default=text("false"), comment="it starts by the rate of its task"),
    Column("not_before", DateTime(timezone=True), comment="its due_at once its gates are open"),
    CheckConstraint(f"state IN ({_states})", name="jobs_state_known"),
    CheckConstraint("priority BETWEEN 0 AND 9", name="jobs_priority_range"),
    CheckConstraint(f"(finished_at IS NOT NULL) = (state IN ({_final}))", name="jobs_finished_when_final"),
    Index("jobs_state_seq", "state", "seq"),
    Index(
        "jobs_backlog",
        text("(- priority)"),
        "seq",
        postgresql_where=text("state IN ('accepted', 'waiting')"),
    ),
    Index("jobs_committed", "incarnation", postgresql_where=text("step = 3")),
    Index("jobs_replaces", "replaces", postgresql_where=text("replaces IS NOT NULL")),
    Index("jobs_outbox", "id", postgresql_where=text("outbox IS NOT NULL")),
    Index("jobs_finished", "finished_at", postgresql_where=text("finished_at IS NOT NULL")),
    Index("jobs_due", "due_at", postgresql_where=text("state = 'scheduled'")),
    Index(
        "jobs_revoked",
        "id",
        postgresql_where=text("revoked_at IS NOT NULL AND finished_at IS NULL"),
    ),
    Index(
        "jobs_stamps",
        "stamps",
        postgresql_using="gin",
        postgresql_ops={"stamps": "jsonb_path_ops"},
        postgresql_where=text("stamps IS NOT NULL AND finished_at IS NULL"),
    ),
    Index(
        "jobs_expiring",
        "expires_at",
        postgresql_where=text("expires_at IS NOT NULL AND state IN ('accepted', 'waiting', 'scheduled')"),
    ),
    Index(
        "jobs_let_go",
        "name",
        postgresql_where=text(
            "rated AND (state IN ('accepted', 'waiting', 'admitted') OR (state = 'scheduled' AND due_at IS NOT NULL))"
        ),
    ),
    Index(
        "jobs_held",
        "name",
        text("(- priority)"),
        "seq",
        postgresql_where=text("rated AND state = 'scheduled' AND due_at IS NULL AND needs = 0"),
    ),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", Text, primary_key=True),
    Column("epoch", BigInteger, primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("worker", Text, nullable=False),
    Column("incarnation", Text, nullable=False),
    Column("admitted_at", DateTime(timezone=True)),
    Column("started_at", DateTime(timezone=True)),
    Column("ended_at", DateTime(timezone=True)),
    Column("outcome", Text, comment="a final state, retried, handed_back, taken_back or lost"),
    Column("error", Text),
)

# Jobs that ended long ago, without messages. `archive_finished` moves them here (migration 0003,
# routing.store.archive).
jobs_archive = Table(
    "jobs_archive",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False, comment="order of submission"),
    Column("id", Text, nullable=False, comment="the Celery task id; it may be used again"),
    Column("name", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("losses", SmallInteger, nullable=False),
    Column("worker", Text),
    Column("incarnation", Text),
    Column("priority", SmallInteger, nullable=False),
    Column("request", JSONB, nullable=False),
    Column("declared", Boolean, nullable=False),
    Column("queue", Text, nullable=False),
    Column("retries", Integer, nullable=False),
    Column("nesting", Integer, nullable=False),
    Column("root_id", Text),
    Column("parent_id", Text),
    Column("submitted_at", DateTime(timezone=True), nullable=False),
    Column("due_at", DateTime(timezone=True)),
    Column("expires_at", DateTime(timezone=True)),
    Column("admitted_at", DateTime(timezone=True)),
    Column("started_at", DateTime(timezone=True)),
    Column("finished_at", DateTime(timezone=True), nullable=False),
    Column("error", Text),
    Column("message_bytes", Integer, nullable=False, comment="how long the message was"),
    Column("archived_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Index("jobs_archive_id", "id"),
)

attempts_archive = Table(
    "attempts_archive",
    metadata,
    Column("job_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, primary_key=True, autoincrement=False),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("worker", Text, nullable=False),
    Column("incarnation", Text, nullable=False),
    Column("admitted_at", DateTime(timezone=True)),
    Column("started_at", DateTime(timezone=True)),
    Column("ended_at", DateTime(timezone=True), nullable=False),
    Column("outcome", Text),
    Column("error", Text),
)

workers = Table(
    "workers",
    metadata,
    Column("incarnation", Text, primary_key=True, comment="one life of a worker"),
    Column("name", Text, nullable=False),
    Column("cpus", BigInteger, nullable=False, comment="millicores"),
    Column("memory", BigInteger, nullable=False, comment="bytes"),
    Column("capacity", JSONB, nullable=False, comment="people's units: {cpus, memory, slots, ...}"),
    Column("status", Text, nullable=False, comment="ready, draining, left or lost"),
    Column("hostname", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("machine_id", Text, comment="a digest of the machine's id; null: an older release"),
    Column("boot_id", Text, nullable=False, comment="the boot, and the namespaces in which its pid and ticks count"),
    Column("start_ticks", BigInteger, comment="clock ticks from the boot to its start"),
    Column("version", Text, nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False),
    Column("seen_at", DateTime(timezone=True), nullable=False),
    Column("left_at", DateTime(timezone=True)),
    Column(
        "ledger_lost_at",
        DateTime(timezone=True),
        comment="since when it cannot reach the ledger; null: it can",
    ),
    CheckConstraint("status IN ('ready', 'draining', 'left', 'lost')", name="workers_status_known"),
    Index("workers_name", "name", "started_at"),
    Index("workers_live", "name", postgresql_where=text("status IN ('ready', 'draining')")),
)

authority = Table(
    "authority",
    metadata,
    # The table has one row: the primary key can only be true.
    Column("only", Boolean, primary_key=True, server_default=text("true")),
    Column("epoch", BigInteger, nullable=False),
    Column("authority", Text, nullable=False, comment="which store admits: ledger or postgres"),
    Column("changed_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Column("opening_at", DateTime(timezone=True), comment="its opener's last word; null: nobody opens it"),
    Column(
        "database_id",
        Text,
        nullable=False,
        server_default=text("gen_random_uuid()"),
        comment="tells this database from others; the ledger notes whose books it has",
    ),
    CheckConstraint('"only"', name="authority_one_row"),
    CheckConstraint("authority IN ('ledger', 'postgres')", name="authority_known"),
)

# The worker that runs the duties while Postgres decides: one row, made by the first election.
runner = Table(
    "runner",
    metadata,
    Column("only", Boolean, primary_key=True, server_default=text("true")),
    Column("incarnation", Text, nullable=False, comment="who runs the duties while Postgres decides"),
    Column("fence", BigInteger, nullable=False, comment="grows with each new holder"),
    Column("until", DateTime(timezone=True), nullable=False, comment="the lease runs out then"),
    CheckConstraint('"only"', name="runner_one_row"),
)

declarations = Table(
    "declarations",
    metadata,
    Column("name", Text, primary_key=True, comment="name of a task"),
    Column("request", JSONB, nullable=False, comment="people's units"),
    Column("seen_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
)

# Messages that could not be read as task messages, as they came.
quarantine = Table(
    "quarantine",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("raw", LargeBinary, nullable=False, comment="the message as it came, cut at 1 MiB"),
    Column("queue", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("worker", Text, comment="who set it aside"),
    Column("seen_at", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    Index("quarantine_seen", "seen_at"),
)

# Unique keys, each with the job that has it.
unique_keys = Table(
    "unique_keys",
    metadata,
    Column("key", Text, primary_key=True, comment="a digest of what must be unique"),
    Column("job", Text, nullable=False, comment="who has it"),
    Column("until", DateTime(timezone=True), comment="it has it until then, though it ends"),
    Column("claimed_at", DateTime(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
)

# Jobs that wait for other jobs to succeed. A row is deleted once it is decided whether its job may start.
dependencies = Table(
    "dependencies",
    metadata,
    Column("job_seq", BigInteger, primary_key=True, autoincrement=False),
    Column("needs", Text, primary_key=True, comment="the job whose success it waits for"),
    Column("job", Text, nullable=False, comment="the job that waits"),
    Column("ended_as", Text, comment="how the other ended; null: it has not"),
    Index("dependencies_open", "needs", postgresql_where=text("ended_as IS NULL")),
    Index("dependencies_ripe", "job", postgresql_where=text("ended_as IS NOT NULL")),
)

# Rates at which jobs of a task may start: a token bucket for each task.
rates = Table(
    "rates",
    metadata,
    Column("name", Text, primary_key=True, comment="name of a task"),
    Column("rate", Float(53), nullable=False, comment="starts a second; 0: as many as fit"),
    Column("said", Text, nullable=False, comment="the same as somebody wrote it: 10/m"),
    Column(
        "by_control",
        Boolean,
        nullable=False,
        server_default=text("false"),
        comment="set at run time, which wins over what tasks declare",
    ),
    Column("tokens", Float(53), nullable=False, server_default=text("1"), comment="starts that are left"),
    Column("counted_at", DateTime(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
    Column("idle", Boolean, nullable=False, server_default=text("true"), comment="none is held back"),
)

# Chords that are counted here, because Redis was away when they were made.
chords = Table(
    "chords",
    metadata,
    Column("group_id", Text, primary_key=True, comment="Celery's id of its header"),
    Column("size", Integer, comment="parts of its header; null: not known yet"),
    Column("structure", Text, comment="the nested results of its header as JSON; null: none are nested"),
    Column("made_at", DateTime(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
)

# Parts of these chords, and of chords whose size is not known yet.
chord_parts = Table(
    "chord_parts",
    metadata,
    Column("group_id", Text, primary_key=True),
    Column("member", Text, primary_key=True, comment="the job and its place in the header"),
    Column("position", Float(53), nullable=False, comment="its place in the header"),
    Column("outcome", LargeBinary, nullable=False, comment="its state and value, encoded"),
    Column("made_at", DateTime(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
)
