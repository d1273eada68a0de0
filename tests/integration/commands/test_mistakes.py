"""A person's mistake ends a command with one message and the exit code of its kind, never with a traceback.

Where streams and signals matter, the process is started as by hand.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text

from celery_capacity.routing.config.embedded import Pair
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.jobs.submitting import standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.servers.given import numbered
from tests.fixtures.waiting import until

UNKNOWN = "00000000-0000-0000-0000-000000000000"
NOWHERE = "127.0.0.1:1"


@dataclass(frozen=True)
class Mistake:
    """Mistake on a command line, and the expected answer.

    `line` is typed after `celery`. `says` has the wrong value and the advice. Braces stand for the platform's own
    `redis`, `database`, `nobody` and `empty`, which are URLs, for the taken `port`, and for `trace` and `folder`.
    """

    line: str
    code: Exit
    says: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{' '.join(f'{name}={value}' for name, value in self.environment.items())} {self.line}".strip()


MISTAKES = [
    # the command line
    Mistake("-A platform jbos", Exit.USAGE, ("jbos", "jobs")),
    Mistake("-A nowhere cluster", Exit.USAGE, ("nowhere was not found",)),
    Mistake("cluster", Exit.USAGE, ("'default' is not on the platform", "celery -A platform")),
    Mistake("-A platform jobs --limit many", Exit.USAGE, ("'many'", "--limit", "--help")),
    Mistake("-A platform jobs --state sleeping", Exit.USAGE, ("'sleeping'", "'waiting'")),
    Mistake("-A platform jobs --stat failed", Exit.USAGE, ("--stat", "--state")),
    Mistake("-A platform up --worker big", Exit.USAGE, ("'big'", "worker-01=72")),
    Mistake("-A platform demo --trace {folder}/none.csv", Exit.USAGE, ("none.csv", "does not exist")),
    # things that do not exist, or are not possible
    Mistake(f"-A platform job {UNKNOWN}", Exit.FAILED, (f"no job {UNKNOWN}", "`celery -A platform jobs`")),
    Mistake("-A platform job 'a b'", Exit.FAILED, ("'a b'", "such as a UUID")),
    Mistake("-A platform db upgrade nope", Exit.FAILED, ("'nope'", '"head"')),
    Mistake("-A platform dashboard --port {port}", Exit.FAILED, ("127.0.0.1:{port}", "--port")),
    Mistake("-A platform demo --trace {trace}", Exit.FAILED, ("line 1", "must name submit, run, cpus")),
    # settings
    Mistake("-A platform cluster", Exit.CONFIGURATION, ("'many'", "such as 4 or 0.5"), {"PLATFORM_CPUS": "many"}),
    Mistake("-A platform worker", Exit.CONFIGURATION, ("'many'", "such as 4 or 0.5"), {"PLATFORM_CPUS": "many"}),
    Mistake("-A platform beat", Exit.CONFIGURATION, ("'soon'", "PLATFORM_WORKER_TTL"), {"PLATFORM_WORKER_TTL": "soon"}),
    Mistake("-A platform jobs", Exit.CONFIGURATION, ("'http://x/0'", "redis://"), {"REDIS_URL": "http://x/0"}),
    Mistake(
        "-A platform jobs", Exit.CONFIGURATION, ("'mysql://x/y'", "postgresql://"), {"DATABASE_URL": "mysql://x/y"}
    ),
    Mistake("-A platform jobs", Exit.CONFIGURATION, ("DATABASE_URL is not", "set both"), {"DATABASE_URL": ""}),
    Mistake(
        "-A platform jobs",
        Exit.CONFIGURATION,
        ("DATABASE_URL='postgresql://me:***@db:many/x' is not valid", "postgresql://user@host:5432/name"),
        {"DATABASE_URL": "postgresql://me:hunter2@db:many/x"},
    ),
    Mistake(
        "-A platform worker", Exit.CONFIGURATION, ("'nowhere'", "Start in the folder"), {"PLATFORM_IMPORTS": "nowhere"}
    ),
    Mistake("-A platform beat", Exit.CONFIGURATION, ("'a.b'", "Start in the folder"), {"PLATFORM_IMPORTS": "a.b"}),
    Mistake("-A platform worker", Exit.CONFIGURATION, ("http://", "redis://"), {"CELERY_BROKER_URL": "http://x"}),
    Mistake(
        "-A platform worker",
        Exit.CONFIGURATION,
        ("nonsense://me:***@x", "CELERY_RESULT_BACKEND"),
        {"CELERY_RESULT_BACKEND": "nonsense://me:hunter2@x"},
    ),
    Mistake(
        "-A platform servers start",
        Exit.CONFIGURATION,
        ("PLATFORM_HOME='/dev/null/home'", "a folder that you may write"),
        {"REDIS_URL": "", "DATABASE_URL": "", "PLATFORM_HOME": "/dev/null/home"},
    ),
    # stores
    *(
        Mistake(
            f"-A platform {words}",
            Exit.UNAVAILABLE,
            ("REDIS_URL", "celery -A platform up"),
            {"REDIS_URL": "", "DATABASE_URL": "", "PLATFORM_HOME": "/dev/null/home"},
        )
        for words in ("jobs", "cluster", "worker", "beat", "db upgrade", "verify")
    ),
    Mistake("-A platform reconcile", Exit.UNAVAILABLE, (NOWHERE, "REDIS_URL"), {"REDIS_URL": f"redis://{NOWHERE}/0"}),
    Mistake(
        "-A platform jobs",
        Exit.UNAVAILABLE,
        ('"127.0.0.1", port 1', "Connection refused. Is the server running", "DATABASE_URL"),
        {"DATABASE_URL": f"postgresql://me:hunter2@{NOWHERE}/platform"},
    ),
    Mistake("-A platform reconcile", Exit.CONFIGURATION, ("invalid username", "password."), {"REDIS_URL": "{guarded}"}),
    Mistake("-A platform db current", Exit.CONFIGURATION, ('"nobody"', "DATABASE_URL"), {"DATABASE_URL": "{nobody}"}),
    Mistake("-A platform reconcile", Exit.CONFIGURATION, ("DB index is out of range",), {"REDIS_URL": "{beyond}"}),
    Mistake("-A platform db current", Exit.CONFIGURATION, ('sslmode value: "safe"',), {"DATABASE_URL": "{unsafe}"}),
    Mistake("-A platform db current", Exit.CONFIGURATION, ('option "colour"',), {"DATABASE_URL": "{coloured}"}),
    Mistake(
        "-A platform reconcile",
        Exit.UNAVAILABLE,
        (f"does not serve: of the Sentinels {NOWHERE}, 127.0.0.1:2 none names a primary 'main'. Check",),
        {"REDIS_URL": f"sentinel://{NOWHERE}/0;sentinel://127.0.0.1:2/0?master_name=main"},
    ),
    Mistake("-A platform verify", Exit.CONFIGURATION, ("celery -A platform db upgrade",), {"DATABASE_URL": "{empty}"}),
]


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with standing_platform(server_pair, tmp_path_factory.mktemp("mistakes")) as running:
        yield running


@pytest.fixture(scope="module")
def there(platform: Platform) -> Iterator[dict[str, str]]:
    """Yield the values of the braces in the table."""
    database = make_url(str(platform.settings.database_url))
    redis = str(platform.settings.redis_url)
    trace = platform.folder / "no-columns.csv"
    trace.write_text("1,2,3\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield {
            "guarded": redis.replace("//", "//me:hunter2@"),
            "nobody": database.set(username="nobody").render_as_string(hide_password=False),
            "empty": database.set(database="postgres").render_as_string(hide_password=False),
            "beyond": numbered(redis, 99999),
            "unsafe": database.update_query_dict({"sslmode": "safe"}).render_as_string(hide_password=False),
            "coloured": database.update_query_dict({"colour": "1"}).render_as_string(hide_password=False),
            "port": str(taken.getsockname()[1]),
            "trace": str(trace),
            "folder": str(platform.folder),
        }


def start(platform: Platform, *words: str, **options: Any) -> subprocess.Popen[str]:
    """Start `celery` with these words, as a process whose streams are the test's."""
    environment = {**platform.environment, **options.pop("environment", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "celery", *words], env=environment, cwd=platform.folder, text=True, **options
    )


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_is_told_with_its_value_and_what_to_do(
    platform: Platform, there: dict[str, str], mistake: Mistake
) -> None:
    words = shlex.split(mistake.line.format(**there))
    environment: dict[str, Any] = {name: value.format(**there) for name, value in mistake.environment.items()}
    done = platform.run(*words, **environment)
    assert done.returncode == mistake.code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    for part in mistake.says:
        assert part.format(**there) in done.stderr


def test_every_way_to_be_wrong_is_in_the_table() -> None:
    assert {mistake.code for mistake in MISTAKES} == {
        Exit.FAILED,
        Exit.USAGE,
        Exit.CONFIGURATION,
        Exit.UNAVAILABLE,
    }


# -- streams and signals


@pytest.mark.parametrize("words", ["jobs --json", "job nothing"])
def test_who_stops_reading_ends_the_command_quietly(platform: Platform, words: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with start(
        platform, "-A", "platform", *words.split(), stdout=writing,
        stderr=writing if words == "job nothing" else subprocess.PIPE,
    ) as process:  # fmt: skip
        os.close(writing)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == Exit.BROKEN_PIPE
    assert not stderr


def test_a_full_disk_behind_the_output_is_told(platform: Platform) -> None:
    with (
        Path("/dev/full").open("w") as full,
        start(platform, "-A", "platform", "jobs", "--json", stdout=full, stderr=subprocess.PIPE) as process,
    ):
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == Exit.OUTPUT
    assert stderr.startswith("Error: the output cannot be written: No space left on device. ")
    assert len(stderr.splitlines()) == 1


def test_a_question_is_not_asked_where_there_is_no_standard_input(platform: Platform) -> None:
    line = shlex.join([sys.executable, "-m", "celery", "-A", "platform", "db", "downgrade", "-1"])
    done = subprocess.run(
        ["/bin/sh", "-c", f"exec {line} <&-"],
        env=platform.environment,
        cwd=platform.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == Exit.FAILED, done.stderr
    assert done.stderr.startswith("Error: 0 jobs are in the tables, and what a later revision made is dropped.")
    assert "There is no terminal to ask on: nothing was changed" in done.stderr


def test_ctrl_c_ends_a_command_that_waits_for_postgres(platform: Platform) -> None:
    """The command waits in the driver, where no handler of Python's is called."""
    engine = create_engine(str(platform.settings.database_url), isolation_level="AUTOCOMMIT")
    waiting = text(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    with engine.connect() as held, engine.connect() as other:
        held.execute(text("SELECT pg_advisory_lock(:key)"), {"key": int.from_bytes(b"migrate")})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with start(platform, "-A", "platform", "db", "upgrade", **pipes) as waits:
            until(lambda: other.execute(waiting).scalar_one(), "the command waits for the lock")
            waits.send_signal(signal.SIGINT)
            try:
                out, err = waits.communicate(timeout=60)
            finally:
                waits.kill()
    engine.dispose()
    assert waits.returncode == -signal.SIGINT == 128 - Exit.INTERRUPTED
    assert (out, err) == ("", "")
