"""The users of deploy/redis.acl and the roles of deploy/postgres-roles.sql do all their work, and nothing forbidden.

The Redis is one of its own, since users belong to a whole server. The roles have no passwords, since the socket of the
tests' Postgres lets everybody of this system in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.result import AsyncResult
from redis.exceptions import NoPermissionError
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from celery_capacity import InvalidRequest, NotAccepted, create_app, migrations
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.policy.placement import CANDIDATES, Book
from tests.fixtures.jobs.setting_aside import epoch_of
from tests.fixtures.processes.platforms import ROOT, Platform
from tests.fixtures.servers.guarded import guarded_server
from tests.fixtures.servers.pair import environment_of
from tests.fixtures.stores.books import write_book

ADD = "tests.fixtures.tasks.add"
ACL = ROOT / "deploy" / "redis.acl"
ROLES = ROOT / "deploy" / "postgres-roles.sql"
USERS = ("worker", "submitter", "dashboard")


@pytest.fixture
def guarded_redis() -> Iterator[int]:
    """Yield the port of a Redis with the users of deploy/redis.acl, unchanged."""
    with guarded_server(ACL, "change-me-admin") as port:
        yield port


def url_of(user: str, port: int) -> str:
    return f"redis://{user}:change-me-{user}@127.0.0.1:{port}/0"


@pytest.fixture
def role_url(database_url: str) -> Any:
    """Yield `role_url("worker")`: the URL of this test's database for a role of deploy/postgres-roles.sql."""
    engine = create_engine(database_url, isolation_level="AUTOCOMMIT")
    statements = ROLES.read_text(encoding="utf-8")
    with engine.connect() as connection:
        for _ in range(2):  # a second run, as after an upgrade, changes nothing
            # The driver's own cursor takes no parameters, so "%" stands for itself.
            cursor = connection.connection.cursor()
            cursor.execute(statements)
            cursor.close()
        for role in ("owner", *USERS):
            connection.execute(text(f"ALTER ROLE platform_{role} LOGIN"))
    engine.dispose()
    return lambda role: make_url(database_url).set(username=f"platform_{role}").render_as_string(hide_password=False)


@pytest.fixture
def platform(guarded_redis: int, role_url: Any, database_url: str, tmp_path: Path) -> Iterator[Platform]:
    """Yield a platform whose processes are the worker's user, while the test itself looks as the administrator."""
    environment = environment_of(url_of("worker", guarded_redis), role_url("worker"), tmp_path)
    engine = create_engine(database_url)
    with redis.Redis.from_url(url_of("admin", guarded_redis)) as client:
        running = Platform(Settings.from_environ(environment), environment, tmp_path, engine, client)
        yield running
        running.stop()
    engine.dispose()


@pytest.fixture
def submitter(platform: Platform, guarded_redis: int, role_url: Any, tmp_path: Path) -> Iterator[Celery]:
    environment = environment_of(url_of("submitter", guarded_redis), role_url("submitter"), tmp_path)
    app = create_app("submitter", resolve=lambda _: Settings.from_environ(environment))
    yield app
    app.close()
    app.platform.engine.dispose()
    app.platform.redis.close()


def denied(client: Any) -> list[str]:
    """Return the refused commands and their users, as the server noted them."""
    return [f"{entry['username']}: {entry['object']} ({entry['reason']})" for entry in client.acl_log()]


def test_the_whole_main_job_runs(platform: Platform, submitter: Celery, guarded_redis: int, role_url: Any) -> None:
    platform.worker("a", cpus=2)
    platform.beat()
    looking = {"REDIS_URL": url_of("dashboard", guarded_redis), "DATABASE_URL": role_url("dashboard")}
    results: list[AsyncResult] = [submitter.send_task(ADD, [1, number], cpus=1) for number in range(5)]
    assert [result.get(timeout=60) for result in results] == [1, 2, 3, 4, 5]
    wide = submitter.send_task(ADD, [1, 2], cpus=64)
    later = submitter.send_task(ADD, [1, 2], countdown=0.5)
    again = submitter.send_task(ADD, [1, 2], task_id=wide.id)
    assert (later.get(timeout=60), again.id) == (3, wide.id)
    many = submitter.submit_many(ADD, [(1, number) for number in range(3)])
    with Session(submitter.platform.engine.execution_options(isolation_level="READ COMMITTED")) as session:
        bought = submitter.send_task(ADD, [1, 2], session=session)
        session.commit()
    assert [result.get(timeout=60) for result in (*many, bought)] == [1, 2, 3, 3]
    first = submitter.send_task(ADD, [1, 1], unique="one", unique_for=3600)
    last = submitter.send_task(ADD, [2, 2], after=[first, later])
    assert (submitter.send_task(ADD, [1, 1], unique="one").id, last.get(timeout=60)) == (first.id, 4)
    with platform.engine.begin() as connection:
        connection.execute(text("INSERT INTO rates (name, rate, said) VALUES (:name, 0.1, '6/m')"), {"name": ADD})
    submitter.amqp.job_sender.rates.forget()
    assert submitter.send_task(ADD, [3, 3]).get(timeout=60) == 6

    seen = platform.celery("cluster", "--json", **looking)
    assert seen.returncode == 0, seen.stderr
    cluster = json.loads(seen.stdout)
    assert (cluster["source"], cluster["resources"]["waiting_jobs"]) == ("ledger", 1)
    listed = platform.celery("jobs", "--json", **looking)
    assert len(json.loads(listed.stdout)) == 14, listed.stderr
    explained = json.loads(platform.celery("job", wide.id, "--json", **looking).stdout)
    assert (explained["why"]["why"], explained["message_bytes"]) == ("too-large", None)
    # An administrator's work needs only the worker's rights: revoke waiting jobs, and check the invariants.
    assert platform.celery("verify", "--json").returncode == 0
    # No command that any user needs was refused to it. CONFIG is excepted: it is tried, to learn the eviction policy.
    assert [entry for entry in denied(platform.redis) if "config" not in entry] == []


def test_commands_act_with_the_rights_of_their_roles(platform: Platform, guarded_redis: int, role_url: Any) -> None:
    platform.environment["PLATFORM_IMPORTS"] = "tests.fixtures.tasks,tests.tasks.ends"
    platform.worker("a", cpus=2)
    submitting = {"REDIS_URL": url_of("submitter", guarded_redis), "DATABASE_URL": role_url("submitter")}
    sent = platform.celery("submit", ADD, "--args", "[1, 2]", "--wait", **submitting)
    assert sent.returncode == 0, sent.stderr
    refused = platform.celery("submit", ADD, "--args", "[1, 2]", "--json", **submitting)
    assert (refused.returncode, "deploy/postgres-roles.sql" in refused.stdout) == (78, True)
    # The dashboard's user of Redis hears of no job.
    looking = {**submitting, "DATABASE_URL": role_url("dashboard")}
    job = sent.stdout.strip()
    assert platform.celery("wait", job, **looking).returncode == 0
    with platform.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM jobs")).scalar_one() == 1
    # Acting on the jobs of others needs the rights of a worker.
    retried = platform.celery("retry", job, "--again", "--json")
    assert retried.returncode == 0, retried.stderr
    requeued = platform.celery("submit", "tests.tasks.ends.rejected_once", "--wait")
    assert requeued.returncode == 0, requeued.stderr
    later = platform.celery("submit", ADD, "--args", "[1, 2]", "--countdown", "3600").stdout.strip()
    assert platform.celery("cancel", later).returncode == 0
    assert [entry for entry in denied(platform.redis) if "config" not in entry] == []


def test_a_submitter_looks_on_where_the_first_candidates_have_no_room(platform: Platform, submitter: Celery) -> None:
    platform.worker("z", cpus=4)
    crowd = [f"small-{number}" for number in range(CANDIDATES + 1)]
    ledger = Ledger(platform.settings)
    ledger.epoch = epoch_of(platform)
    for name in crowd:
        write_book(ledger, Book(name, {"cpus": 2000, "memory": 2**30 + 1, "slots": 2}, {}))
    try:
        assert submitter.send_task(ADD, [1, 2], cpus=1, memory=2**30 + 2).get(timeout=60) == 3
    finally:
        platform.redis.delete(*map(keys.book, crowd))
        for index in (keys.FREE, keys.free_of("memory"), keys.LEASES):
            platform.redis.zrem(index, *crowd)
        ledger.client.close()
    assert [entry for entry in denied(platform.redis) if "config" not in entry] == []


def test_without_a_ledger_the_dashboard_reads_the_tables_that_it_may(
    platform: Platform, submitter: Celery, role_url: Any
) -> None:
    assert platform.celery("reconcile").returncode == 0
    submitter.send_task(ADD, [1, 2])
    looking = {"REDIS_URL": "redis://127.0.0.1:1/0", "DATABASE_URL": role_url("dashboard")}
    seen = platform.celery("cluster", "--json", **looking)
    assert seen.returncode == 0, seen.stderr
    assert json.loads(seen.stdout)["source"] == "postgres"


#: Commands for administrators only. ALSO_NEVER has further commands that each user must not send.
NEVER = (
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("CONFIG", "SET", "maxmemory", "1"),
    ("CONFIG", "GET", "*"),
    ("KEYS", "*"),
    ("SHUTDOWN", "NOSAVE"),
    ("MONITOR",),
    ("SAVE",),
    ("REPLICAOF", "127.0.0.1", "1"),
    ("ACL", "LIST"),
    ("ACL", "SETUSER", "worker", "+@all"),
    ("CLIENT", "KILL", "TYPE", "normal"),
    ("SCRIPT", "FLUSH"),
    ("SWAPDB", "0", "1"),
    ("SET", "somebody-else-s", "x"),
    ("GET", "somebody-else-s"),
)
ALSO_NEVER = {
    "worker": (),
    "submitter": (
        ("BRPOP", "worker.a.life", "1"),
        ("RPOP", "worker.a.life"),
        ("LRANGE", "worker.a.life", "0", "-1"),
        ("LPUSH", "celery", "x"),
        # Any publisher of remote control can end workers and their bodies.
        ("PUBLISH", "/0.celery.pidbox", "x"),
        ("PUBLISH", "/7.celery.pidbox", "x"),
        ("SUBSCRIBE", "/0.celery.pidbox"),
        ("LPUSH", "a@host.celery.pidbox", "x"),
        ("PUBLISH", "/0.platform.ticks", "x"),
        ("SCAN", "0"),
        ("RENAME", "ledger:epoch", "ledger:x"),
    ),
    "dashboard": (
        ("HSET", "ledger:book:a", "status", "closed"),
        ("DEL", "ledger:epoch"),
        ("EVAL", "return 1", "0"),
        ("LRANGE", "worker.a.life", "0", "-1"),
        ("GET", "celery-task-meta-x"),
        ("PUBLISH", "/0.celery.pidbox", "x"),
        ("SUBSCRIBE", "celery-task-meta-x"),
        ("LPUSH", "celery", "x"),
    ),
}


@pytest.mark.parametrize("user", USERS)
def test_redis_refuses_what_a_user_has_no_need_of(guarded_redis: int, user: str) -> None:
    with redis.Redis.from_url(url_of(user, guarded_redis)) as client:
        for words in (*NEVER, *ALSO_NEVER[user]):
            with pytest.raises(NoPermissionError):
                client.execute_command(*words)


def test_nobody_comes_in_without_a_password(guarded_redis: int) -> None:
    with redis.Redis(port=guarded_redis) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


REFUSED = {
    "worker": (
        "DELETE FROM jobs",
        "DROP TABLE jobs",
        "ALTER TABLE jobs ADD COLUMN x int",
        "TRUNCATE attempts",
        "CREATE TABLE mine (x int)",
        "UPDATE alembic_version SET version_num = 'x'",
        "SET ROLE platform_owner",
        "COPY jobs TO PROGRAM 'cat'",
        "DELETE FROM authority",
        "DELETE FROM jobs_archive",
        "INSERT INTO jobs_archive SELECT FROM jobs_archive",
        "SELECT drop_archived(0)",
        "DROP FUNCTION archive_finished(double precision, integer)",
        "DROP TRIGGER jobs_awaited ON jobs",
        "INSERT INTO unique_keys (key, job) VALUES ('x', 'x')",
        "UPDATE dependencies SET ended_as = 'succeeded'",
    ),
    "submitter": (
        "SELECT archive_finished(0, 1)",
        "SELECT open_archive(false)",
        "SELECT * FROM jobs_archive",
        "SELECT message FROM jobs",
        "SELECT * FROM jobs",
        "SELECT successor FROM jobs",
        "UPDATE jobs SET state = 'succeeded'",
        "UPDATE jobs SET successor = 'x'",
        "DELETE FROM jobs",
        "SELECT * FROM attempts",
        "UPDATE authority SET epoch = 1",
        "INSERT INTO attempts (job_id) VALUES ('x')",
        "SELECT raw FROM quarantine",
        "UPDATE rates SET rate = 1",
        "SELECT * FROM unique_keys",
        "DELETE FROM dependencies",
        "CREATE TABLE mine (x int)",
        "DROP TABLE jobs",
    ),
    "dashboard": (
        "SELECT message FROM jobs",
        "SELECT outbox FROM jobs",
        "SELECT successor FROM jobs",
        "SELECT * FROM jobs",
        "SELECT raw FROM quarantine",
        "UPDATE jobs SET priority = 9",
        "INSERT INTO jobs (id) VALUES ('x')",
        "DELETE FROM workers",
        "UPDATE authority SET authority = 'postgres'",
        "SELECT archive_finished(0, 1)",
        "UPDATE jobs_archive SET state = 'failed'",
        "SELECT claim_key('x', 'x', 0)",
        "SELECT open_rate('x', 1, '1', 1, 1)",
        "SELECT * FROM unique_keys",
        "CREATE TABLE mine (x int)",
    ),
}


@pytest.mark.parametrize("role", USERS)
def test_postgres_refuses_what_a_role_has_no_need_of(role_url: Any, role: str) -> None:
    engine = create_engine(role_url(role), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in REFUSED[role]:
            with pytest.raises(ProgrammingError, match=r"permission denied|must be owner|must be superuser or "):
                connection.execute(text(statement))
    engine.dispose()


def test_a_worker_moves_what_has_ended_and_nothing_that_it_shadows(role_url: Any, engine: Engine) -> None:
    """The function means the platform's tables, whatever the caller names its own objects."""
    ended = create_engine(role_url("worker"), isolation_level="AUTOCOMMIT")
    insert = (
        "INSERT INTO jobs (id, name, state, step, request, shape, queue, message, finished_at) "
        "VALUES ('done', 'task', 'succeeded', 9, '{}', 'slots=1', 'celery', '', now() - interval '1 s')"
    )
    with ended.connect() as connection:
        connection.execute(text(insert))
        connection.execute(text("SET search_path TO pg_temp"))
        assert connection.execute(text("SELECT public.archive_finished(0, 10)")).scalar_one() == 1
    ended.dispose()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT id FROM jobs_archive")).scalars().all() == ["done"]
        assert connection.execute(text("SELECT count(*) FROM jobs")).scalar_one() == 0


def test_worker_makes_months_of_the_archive_that_are_the_owners(role_url: Any, engine: Engine) -> None:
    with engine.begin() as connection:
        for table in ("jobs_archive", "attempts_archive"):
            month = connection.execute(
                text("SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = :t ::regclass"), {"t": table}
            ).scalar_one()
            connection.execute(text(f"DROP TABLE {month}"))
    worker = create_engine(role_url("worker"), isolation_level="AUTOCOMMIT")
    with worker.connect() as connection:
        connection.execute(text("SELECT archive_finished(0, 10), open_archive(true)"))
    worker.dispose()
    owners = (
        "SELECT DISTINCT relowner::regrole::text FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid"
        " WHERE inhparent IN ('jobs_archive'::regclass, 'attempts_archive'::regclass)"
    )
    with engine.connect() as connection:
        assert connection.execute(text(owners)).scalars().all() == ["platform_owner"]


def test_the_owner_migrates_and_the_view_has_no_message(role_url: Any, engine: Engine) -> None:

    migrations.upgrade(role_url("owner"))
    with create_engine(role_url("dashboard")).connect() as connection:
        columns = connection.execute(text("SELECT * FROM jobs_public")).keys()
    assert {"id", "state", "message_bytes"} <= set(columns)
    assert not {"message", "successor", "outbox"} & set(columns)


def test_a_refused_statement_is_told_as_such(guarded_redis: int, role_url: Any, tmp_path: Path) -> None:
    environment = environment_of(url_of("dashboard", guarded_redis), role_url("dashboard"), tmp_path)
    app = create_app("looking", resolve=lambda _: Settings.from_environ(environment))
    with pytest.raises((NotAccepted, InvalidRequest), match="permission denied"):
        app.send_task(ADD, [1, 2])
    app.close()
    app.platform.engine.dispose()


def test_the_patterns_of_the_file_cover_every_key_of_the_ledger() -> None:
    lines = {line.split()[1]: line for line in ACL.read_text().splitlines()}
    for user in USERS:
        patterns = re.findall(r"(?<=~)\S+", lines[user])
        for key in keys.KEYS.values():
            assert any(re.match(pattern.replace("*", ".*"), key) for pattern in patterns), (user, key)
