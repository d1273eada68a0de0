"""A canary: passwords in URLs and arguments that look secret are in no log, event, page or process list."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from celery import Celery
from celery.result import AsyncResult
from sqlalchemy import Engine, create_engine, make_url, text

from celery_capacity import create_app
from celery_capacity.platform.web.http.security import HEADERS
from celery_capacity.routing.config import redaction
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.inspect import overview
from tests.fixtures import tasks
from tests.fixtures.processes.platforms import ROOT, Platform
from tests.fixtures.servers.guarded import guarded_server
from tests.fixtures.servers.pair import environment_of
from tests.fixtures.servers.web import serve
from tests.fixtures.waiting import until

LOGIN, STAY = "tests.tasks.login.login", "tests.tasks.login.stay"
#: Beginning of each secret, so that one look finds all of them.
CANARY = "c4nary"
REDIS_WORD, POSTGRES_WORD = f"{CANARY}-redis", f"{CANARY}-postgres"
ARGUMENTS: dict[str, Any] = {
    "user": "somebody",
    "password": f"{CANARY}-password",
    "api_key": f"{CANARY}-key",
    "headers": {"Authorization": f"Bearer {CANARY}-bearer"},
    "settings": [{"database": {"db_password": f"{CANARY}-nested"}}],
    "url": f"postgresql://me:{CANARY}-url@db/x",
}


def leaks(said: str) -> list[str]:
    return [line[:300] for line in said.splitlines() if CANARY in line]


@pytest.fixture
def environment(database_url: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Yield the environment of a platform whose every URL has a password in it."""
    acl = tmp_path / "users.acl"
    acl.write_text(f"user default off\nuser admin on >{REDIS_WORD} ~* &* +@all\n")
    with guarded_server(acl, REDIS_WORD) as port:
        url = f"redis://admin:{REDIS_WORD}@127.0.0.1:{port}/0"
        database = make_url(database_url).set(password=POSTGRES_WORD).render_as_string(hide_password=False)
        yield {
            **environment_of(url, database, tmp_path),
            "CELERY_BROKER_URL": url,
            "CELERY_RESULT_BACKEND": url,
            "PLATFORM_IMPORTS": "tests.tasks.login",
        }


@pytest.fixture
def platform(environment: dict[str, str], tmp_path: Path) -> Iterator[Platform]:
    settings = Settings.from_environ(environment)
    engine = create_engine(str(settings.database_url))
    with redis.Redis.from_url(str(settings.redis_url)) as client:
        running = Platform(settings, environment, tmp_path, engine, client)
        yield running
        running.stop()
    engine.dispose()


@pytest.fixture
def app(platform: Platform) -> Iterator[Celery]:
    app = create_app("secrets", resolve=lambda _: platform.settings, task_send_sent_event=True)
    yield app
    app.close()
    app.platform.engine.dispose()
    app.platform.redis.close()


class Events(threading.Thread):
    """Listen to all events of the cluster, as Flower does."""

    def __init__(self, app: Celery) -> None:
        super().__init__(daemon=True)
        self._app = app
        self._receiver: Any = None
        self.heard: list[dict[str, Any]] = []
        self.listening = threading.Event()

    def run(self) -> None:
        with self._app.connection_for_read() as connection:
            self._receiver = self._app.events.Receiver(connection, handlers={"*": self.heard.append})
            with self._receiver.consumer_context():
                self.listening.set()
                for _ in self._receiver.consume(limit=None, timeout=None, wakeup=False):
                    continue

    def stop(self) -> None:
        self._receiver.should_stop = True
        self.join(60)


@pytest.mark.long
def test_the_canary_is_nowhere(platform: Platform, app: Celery, engine: Engine) -> None:
    # The command lines of these two processes are looked at too, and a forked process has none of its own.
    platform.forks = False
    events = Events(app)
    events.start()
    assert events.listening.wait(60)
    worker = platform.worker("a", cpus=2, arguments=("--loglevel", "DEBUG", "-E"))
    beat = platform.beat()
    platform.forks = True
    sent: list[AsyncResult] = [
        app.send_task(LOGIN, [{"token": f"{CANARY}-positional"}], ARGUMENTS),
        app.send_task(LOGIN, kwargs={**ARGUMENTS, "fail": True}),
    ]
    app.send_task("no.such.task", kwargs=ARGUMENTS)
    for result in sent:
        result.get(timeout=60, propagate=False)
    waiting = app.send_task(LOGIN, kwargs=ARGUMENTS, cpus=64)
    foreign = _plain_producer(app)
    app.send_task(STAY, ["gate"], ARGUMENTS)
    tasks.started(platform.redis, "gate")
    until(lambda: sum(event["type"] == "task-received" for event in events.heard) >= 3, "the events are heard")

    events.stop()
    lines = {f"worker: {line}" for line in worker.lines} | {f"beat: {line}" for line in beat.lines}
    for words in (
        ("inspect", "conf"),
        ("inspect", "active"),
        ("inspect", "stats"),
        ("report",),
        ("cluster", "--json"),
        ("jobs", "--json"),
        ("jobs",),
        ("job", waiting.id, "--json"),
        ("job", waiting.id),
        ("job", sent[0].id),
        ("job", sent[0].id, "--json"),
        ("job", sent[1].id),
        ("job", foreign),
        ("settings",),
        ("settings", "--json"),
        ("verify", "--json"),
    ):
        done = platform.celery(*words)
        lines |= {f"{' '.join(words)}: {line}" for line in (done.stdout + done.stderr).splitlines()}
    assert "'password': '***'" in "".join(line for line in lines if line.startswith("inspect active"))
    assert "result    7" in "".join(line for line in lines if line.startswith(f"job {sent[0].id}: "))
    tasks.let_go(platform.redis, "gate")
    lines |= {f"event: {event}" for event in map(json.dumps, events.heard)}
    lines |= {f"processes: {line}" for line in _titles(worker.pid, beat.pid)}
    lines.add(f"page: {_page(app)}")
    with platform.engine.connect() as connection:
        columns = "id, name, state, worker, queue, request, error"
        lines |= {f"jobs: {row}" for row in connection.execute(text(f"SELECT {columns} FROM jobs"))}
        lines |= {f"attempts: {row}" for row in connection.execute(text("SELECT * FROM attempts"))}
    assert leaks("\n".join(lines)) == []
    # The secrets were there: the task itself received them.
    assert (sent[0].result, sent[1].state) == (7, "FAILURE")


def _plain_producer(app: Celery) -> str:
    """Return the id of a job with the arguments as a producer that knows nothing of the platform, and hides nothing."""
    plain = Celery("plain", broker=app.conf.broker_url, backend=app.conf.result_backend, set_as_current=False)
    sent = plain.send_task(LOGIN, kwargs=ARGUMENTS)
    assert sent.get(timeout=60) == len(ARGUMENTS)
    plain.close()
    return str(sent.id)


def _titles(*roots: int) -> list[str]:
    """Return the command lines of these processes and of all their children."""
    titles = []
    for root in roots:
        process = psutil.Process(root)
        titles += [" ".join(member.cmdline()) for member in (process, *process.children(recursive=True))]
    return titles


def _page(app: Celery) -> str:
    async def ask(fetch: Any) -> str:
        answer = await fetch("/api/v1/dashboard")
        return f"{answer.headers} {answer.body.decode()}"

    stores = app.platform
    return str(serve(lambda: overview.read(stores.redis, stores.engine).to_json(), ask))


@pytest.mark.parametrize(
    "wrong",
    [
        {"REDIS_URL": f"redis://admin:{CANARY}-wrong@127.0.0.1:1/0"},
        {"REDIS_URL": f"redis://admin:{CANARY}@wrong@nowhere.invalid:1/0"},
        {"REDIS_URL": f"http://admin:{CANARY}-wrong@127.0.0.1/0"},
        {"DATABASE_URL": f"postgresql://me:{CANARY}-wrong@127.0.0.1:1/x"},
        {"DATABASE_URL": f"postgresql://me:wrong@{CANARY}@127.0.0.1:1/x"},
        {"DATABASE_URL": f"postgresql://me@127.0.0.1:1/x?password={CANARY}-wrong"},
        {"DATABASE_URL": f"mysql://me:{CANARY}-wrong@127.0.0.1/x"},
        {"PLATFORM_CPUS": f"redis://me:{CANARY}@x"},
    ],
    ids=lambda wrong: ascii(wrong)[:60],
)
def test_a_start_that_fails_does_not_say_why_with_a_password(platform: Platform, wrong: dict[str, str]) -> None:
    broken = {**wrong, "CELERY_BROKER_URL": "", "CELERY_RESULT_BACKEND": ""}
    if "REDIS_URL" not in wrong:
        broken["REDIS_URL"] = str(platform.settings.redis_url)
    for words in (("jobs", "--json"), ("reconcile",)):
        done = platform.celery(*words, **broken)  # type: ignore[arg-type]
        assert leaks(done.stdout + done.stderr) == []
        assert "Traceback" not in done.stderr


SECRET_NAMES = (
    "password PASSWORD db_password token access_token client_secret api_key apikey Authorization cookie credentials"
)


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_a_name_that_looks_secret(name: str) -> None:
    assert redaction.looks_secret(name)
    assert redaction.hidden({name: "x", "other": 1}) == {name: "***", "other": 1}
    assert redaction.hidden([{"a": ({name: "x"},)}]) == [{"a": ({name: "***"},)}]


def test_arguments_without_secrets_are_not_copied() -> None:
    for arguments in ((1, "a", None), {"a": [1, {"b": 2}]}, [float("nan")], ()):
        assert redaction.hidden(arguments) is arguments


def test_a_caller_may_say_what_is_shown() -> None:
    nowhere = Settings.from_environ(
        {"REDIS_URL": "redis://127.0.0.1:1/0", "DATABASE_URL": "postgresql://me@127.0.0.1:1/x"}
    )
    app = create_app("said", resolve=lambda _: nowhere)
    message = app.amqp.as_task_v2("id", LOGIN, ["hunter2"], {"pin": 1}, argsrepr="(hidden)", kwargsrepr="{}")
    assert (message.headers["argsrepr"], message.headers["kwargsrepr"]) == ("(hidden)", "{}")
    message = app.amqp.as_task_v2("id", LOGIN, ["seen"], {"password": "x"})
    assert (message.headers["argsrepr"], message.headers["kwargsrepr"]) == ("['seen']", "{'password': '***'}")
    app.close()


def test_the_dashboard_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    assert Settings.from_environ({}).dashboard[0] == "127.0.0.1"
    assert HEADERS["X-Frame-Options"] == "DENY"
    assert ROOT.joinpath("deploy", "redis.acl").exists()
