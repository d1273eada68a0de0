"""Hostile input at every entry point: a typed error, nothing written, no process dead.

The entry points are the Python API, the command line, HTTP, and messages of producers that know nothing of the
platform.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery import Celery
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kombu.serialization import loads
from sqlalchemy import Engine, text

from celery_capacity import NotAccepted, OutcomeUnknown, PlatformError, create_app
from celery_capacity.platform.web.application import Application
from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers import plugin
from celery_capacity.workers.broker.transport import receiving
from celery_capacity.workers.execute.enroll import Intake
from celery_capacity.workers.membership.served_queues import ServedQueues
from celery_capacity.workers.process.exit_codes import Exit
from celery_capacity.workers.process.stores import Stores, platform_of
from tests.fixtures.jobs.hostile import CORPUS, TEXTS, jsons, texts, values
from tests.fixtures.processes.platforms import FOREIGN
from tests.fixtures.property_tests import examples
from tests.fixtures.servers.web import UNBOUNDED, Prescribed, serving
from tests.fixtures.stores.staged import Stage

TASK = "tests.fixtures.tasks.add"

#: Settings of hypothesis for real servers behind each example: the fixtures stay for all of a test's examples.
hostile = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Written:
    """Contents of both stores, to be compared before and after."""

    def __init__(self, client: redis.Redis, engine: Engine) -> None:
        self._client = client
        self._engine = engine

    def rows(self) -> int:
        with self._engine.connect() as connection:
            return int(connection.execute(text("SELECT count(*) FROM jobs")).scalar_one())

    def ids(self) -> set[str]:
        with self._engine.connect() as connection:
            return set(connection.execute(text("SELECT id FROM jobs")).scalars())

    def all(self) -> tuple[int, set[Any]]:
        return self.rows(), set(self._client.keys())


@pytest.fixture
def stage(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    return stage


@pytest.fixture
def app(stage: Stage, settings: Settings) -> Iterator[Celery]:
    app = create_app("hostile", resolve=lambda _: settings)
    yield app
    app.close()
    app.platform.engine.dispose()
    app.platform.redis.close()


@pytest.fixture
def written(stage: Stage, redis_client: redis.Redis, engine: Engine) -> Written:
    return Written(redis_client, engine)


# -- the Python API

#: Options that `apply_async` takes, and options that it refuses.
OPTIONS = (
    "task_id", "priority", "cpus", "memory", "gpus", "resources", "queue", "routing_key", "exchange", "headers",
    "eta", "expires", "countdown", "retries", "time_limit", "soft_time_limit", "serializer", "compression",
    "root_id", "parent_id", "group_id", "group_index", "shadow", "stamped_headers", "stamps", "reply_to",
    "correlation_id", "argsrepr", "kwargsrepr", "ignore_result", "chord", "link", "link_error",
    "replaced_task_nesting", "unique", "session", "after", "cpu", "mem", "content_type", "content_encoding",
    "expiration", "delivery_tag", "body_encoding", "kwargs", "anything",
)  # fmt: skip


def _send(app: Celery, written: Written, name: Any, args: Any, options: dict[str, Any]) -> None:
    """Send a job: it is accepted with one row, or refused with none by an error of the platform that says so.

    A call with an id or a unique key that an earlier example used is that example's job, and writes no row.
    """
    # The ledger hears of several jobs in a row a moment later.
    assert app.platform.sending.flush()
    before, ids = written.all(), written.ids()
    try:
        result = app.send_task(name, args, **options)
    except PlatformError as error:
        assert not isinstance(error, (NotAccepted, OutcomeUnknown)), error
        assert written.all() == before
    else:
        assert written.ids() == ids | {str(result.id)}
        assert written.rows() == before[0] + (str(result.id) not in ids)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_a_call(app: Celery, written: Written, option: str) -> None:
    for value in CORPUS:
        _send(app, written, TASK, [1, 2], {option: value})


@pytest.mark.parametrize("option", ["task_id", "unique"])
def test_an_option_of_two_equal_calls(app: Celery, written: Written, option: str) -> None:
    for _ in range(2):
        _send(app, written, TASK, [1, 2], {option: "0"})


@hostile
@given(option=st.sampled_from(OPTIONS), value=values())
def test_any_option_of_a_call(app: Celery, written: Written, option: str, value: Any) -> None:
    _send(app, written, TASK, [1, 2], {option: value})


@hostile
@given(name=values(), args=values())
def test_any_name_and_any_arguments(app: Celery, written: Written, name: Any, args: Any) -> None:
    _send(app, written, name, args, {})


@hostile
@given(
    headers=st.dictionaries(texts() | st.sampled_from(["capacity_request", "retries", "eta", "timelimit"]), values())
)
def test_any_headers(app: Celery, written: Written, headers: dict[str, Any]) -> None:
    _send(app, written, TASK, [1, 2], {"headers": headers})


@hostile
@given(carried=jsons())
@example(carried={"shape": "cpus=1,,=", "declared": 1})
@example(carried={"shape": "cpus=-1000,slots=1"})
@example(carried={"shape": "a b=1,slots=1"})
@example(carried={"shape": f"cpus={10**16},slots=1"})
@example(carried={})
def test_a_forged_request(app: Celery, written: Written, carried: Any) -> None:
    _send(app, written, TASK, [1, 2], {"headers": {"capacity_request": carried}})


@pytest.mark.parametrize("name", ["platform.nonsense", "platform.", "platform.tasks.mine"])
def test_the_platform_s_own_names_are_not_for_tasks(app: Celery, written: Written, name: str) -> None:
    before = written.all()
    with pytest.raises(PlatformError, match="no task may be named"):
        app.send_task(name)
    assert written.all() == before


@pytest.mark.parametrize("serializer", ["pickle", "yaml"])
def test_what_no_worker_here_would_read_is_not_accepted(app: Celery, written: Written, serializer: str) -> None:
    before = written.all()
    with pytest.raises(PlatformError, match="serializer"):
        app.send_task(TASK, [1, 2], serializer=serializer)
    assert written.all() == before


@hostile
@given(job=texts())
def test_revoking_any_id(app: Celery, written: Written, job: str) -> None:
    before = written.rows()
    with suppress(PlatformError):
        app.control.revoke(job)
    assert written.rows() == before


# -- the command line


@pytest.fixture
def run(stage: Stage, platform_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield `run("jobs", "--json")`: the command as Celery calls it. It ends by an exit code, never by a traceback."""
    for name, value in platform_environment.items():
        monkeypatch.setenv(name, value)
    app: Any = Celery("looking", set_as_current=False)
    app.platform = Stores()

    def invoke(name: str, *arguments: str) -> Any:
        command = import_module(getattr(plugin, name).module).command
        result = CliRunner().invoke(command, list(arguments), obj=SimpleNamespace(app=app))
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        return result

    yield invoke
    app.platform.engine.dispose()
    app.platform.redis.close()


#: Commands that end by themselves on any input, with the words that stand before a hostile argument.
LOOKING = (
    ("job",),
    ("job", "--json"),
    ("jobs", "--state"),
    ("jobs", "--limit"),
    ("jobs",),
    ("cluster",),
    ("verify",),
    ("reconcile",),
    ("db",),
    ("db", "upgrade", "--json"),
    ("db", "downgrade", "--json"),
    ("down",),
    ("servers",),
    ("servers", "start", "--json"),
    ("dashboard",),
    ("dashboard", "--port"),
    ("up", "--worker"),
    ("up", "--pool"),
    ("demo", "--scale"),
    ("demo", "--trace"),
    ("demo", "--worker"),
    ("wait",),
    ("wait", "x", "--timeout"),
    ("cancel",),
    ("cancel", "--state"),
    ("retry", "--json"),
    ("retry", "--failed", "--since"),
    ("submit", "x", "--cpus"),
)
REFUSED = {Exit.FAILED, Exit.USAGE, Exit.CONFIGURATION}


def _is_possible(argument: str) -> bool:
    """Return True if a system can give this argument to a program.

    It has no NUL, and is UTF-8 but for bytes that Python marks with surrogates.
    """
    try:
        return b"\0" not in os.fsencode(argument)
    except UnicodeEncodeError:
        return False


@pytest.mark.parametrize("words", LOOKING, ids=" ".join)
def test_an_argument_of_a_command(run: Any, written: Written, words: tuple[str, ...]) -> None:
    before = written.all()
    for argument in TEXTS:
        # Valid arguments are not refused: an option, or a text with a meaning of its own.
        if (
            not _is_possible(argument)
            or argument in ("--help", "-1", "")
            or (words[-1] in ("--limit", "--port") and argument.isdigit())
        ):
            continue
        result = run(*words, argument)
        assert result.exit_code in REFUSED, (argument, result.output)
        assert "Traceback" not in result.output
    assert written.all() == before


@hostile
@given(words=st.sampled_from([("job",), ("job", "--json"), ("jobs", "--state"), ("jobs", "--limit")]), argument=texts())
def test_any_argument_of_a_command(run: Any, written: Written, words: tuple[str, ...], argument: str) -> None:
    before = written.all()
    result = run(*words, "--", argument) if words[0] == "job" else run(*words, argument)
    assert result.exit_code in {*REFUSED, Exit.OK}
    assert written.all() == before


@pytest.mark.parametrize("host", [host for host in TEXTS if host not in ("", "*")])
def test_an_address_to_listen_on(run: Any, host: str) -> None:
    result = run("dashboard", "--host", host, "--port", "0")
    assert result.exit_code in REFUSED


def test_what_a_task_said_cannot_steer_the_terminal(stage: Stage, run: Any) -> None:
    stage.worker("a", cpus=4000)
    job = stage.submit(cpus=1000)
    stage.end(job, "failed")
    hostile_text = "\x1b[2J\x1b]0;owned\x07\u202e\x9b31m"
    stage.sql("UPDATE jobs SET error = :said, name = :said", said=hostile_text)
    stage.sql("UPDATE attempts SET error = :said", said=hostile_text)
    for words in (("jobs",), ("job", job)):
        shown = run(*words).stdout
        assert not set(shown) & set("\x1b\x07\u202e\x9b")
        assert "owned" in shown
    # A program reads the text unchanged.
    assert json.loads(run("job", job, "--json").stdout)["error"] == hostile_text


# -- HTTP


#: Seconds after which the client leaves a server that waits for more.
SILENT = 2.0
#: Seconds for an answer that surely comes.
PATIENCE = 60.0


def _ask(requests: list[bytes]) -> list[bytes]:
    """Return the dashboard's answer to each of these requests, each on a connection of its own."""
    with serving(Application(Prescribed(lambda: {"secret": 1}), rates=UNBOUNDED)) as url:
        port = int(url.rpartition(":")[2])

        async def ask(request: bytes) -> bytes:
            answer = b""
            with suppress(ConnectionError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request)
                with suppress(TimeoutError):
                    answer = await asyncio.wait_for(reader.read(), PATIENCE if request == HEALTH else SILENT)
                writer.close()
            return answer

        async def ask_all() -> list[bytes]:
            return await asyncio.gather(*map(ask, requests))

        return asyncio.run(ask_all())


def _bytes_of(value: str) -> bytes:
    return value.encode("utf-8", "surrogatepass")


def _request(
    method: bytes = b"GET", path: bytes = b"/api/v1/dashboard", host: bytes = b"127.0.0.1", more: bytes = b""
) -> bytes:
    return method + b" " + path + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n" + more + b"\r\n"


#: Request that is always answered.
HEALTH = _request(path=b"/health")


def _statuses(requests: list[bytes]) -> list[int]:
    """Return the status of each answer, or 0 where the connection was closed without one."""
    statuses = []
    for answer in _ask(requests):
        assert b"Traceback" not in answer
        statuses.append(int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0)
    return statuses


def test_http_with_a_hostile_path_method_query_header_or_host() -> None:
    hostile = [_bytes_of(value) for value in TEXTS if value]
    requests = [
        *(_request(path=b"/" + path) for path in hostile),
        *(_request(path=path) for path in hostile),
        *(_request(method=method) for method in hostile),
        *(_request(path=b"/api/v1/nothing?" + query) for query in hostile),
        *(_request(host=host) for host in hostile),
        *(_request(path=b"/nothing", more=b"X: " + value + b"\r\n") for value in hostile),
        *(_request(path=b"/nothing", more=header + b": x\r\n") for header in hostile),
    ]
    for request, status in zip(requests, _statuses(requests), strict=True):
        assert status == 0 or 400 <= status < 500, (status, request[:200])


@pytest.mark.parametrize(
    "request_",
    [
        _request(more=b"X: " + b"x" * 1_000_000 + b"\r\n"),
        _request(path=b"/" + b"x" * 1_000_000),
        _request(method=b"POST", more=b"Content-Length: 999999999999\r\n"),
        _request(method=b"POST", more=b"Content-Length: -1\r\n"),
        _request(method=b"POST", more=b"Content-Length: 1\r\nContent-Length: 2\r\n"),
        _request(method=b"POST", more=b"Transfer-Encoding: chunked\r\n") + b"zz\r\n",
        b"\x16\x03\x01" + os.urandom(200),
        b"\x00" * 10_000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"",
    ],
    ids=["header", "path", "length", "negative", "two lengths", "chunks", "tls", "zeros", "version", "nothing"],
)
def test_http_that_is_too_large_or_none(request_: bytes) -> None:
    # Requests of others are served.
    first, *others = _statuses([request_, HEALTH, HEALTH, HEALTH])
    assert first == 0 or 400 <= first < 500
    assert others == [200] * 3


@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=30), st.binary(max_size=60)), min_size=20, max_size=20))
def test_any_bytes_over_http(pairs: list[tuple[bytes, bytes]]) -> None:
    requests = [_request(path=b"/nothing" + path, more=more) for path, more in pairs]
    assert all(status == 0 or 400 <= status < 500 for status in _statuses(requests))


# -- the wire


class Message:
    """Message as kombu gives it to a consumer, and the consumer's answers to it."""

    def __init__(self, body: Any, headers: Any, properties: Any, content_type: Any, content_encoding: Any) -> None:
        self.body, self.headers, self.properties = body, headers, properties
        self.content_type, self.content_encoding = content_type, content_encoding
        self.delivery_tag = "tag"
        self.delivery_info: dict[str, Any] = {}
        self.channel = None
        self.answers: list[str] = []

    def decode(self) -> Any:
        return loads(self.body, self.content_type, self.content_encoding, accept={"application/json"})

    def ack(self, *_: Any, **__: Any) -> None:
        self.answers.append("ack")

    def requeue(self, *_: Any, **__: Any) -> None:
        self.answers.append("requeue")

    def reject(self, *_: Any, **__: Any) -> None:
        self.answers.append("reject")


@pytest.fixture
def enroll(app: Celery) -> Callable[[Message], None]:
    serving = ServedQueues(app, platform_of(app).settings, lambda: None)
    return partial(Intake(app, serving, lambda _: None)._enroll, "celery")


FIELDS = (
    "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id",
    "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers",
    "stamps", "capacity_request", "attempt", "compression",
)  # fmt: skip
PROPERTIES = (
    "priority",
    "correlation_id",
    "reply_to",
    "delivery_mode",
    "delivery_info",
    "delivery_tag",
    "body_encoding",
)


def _plain(number: int) -> dict[str, Any]:
    return {"lang": "py", "task": TASK, "id": f"old-{number}", "retries": 0, "timelimit": [None, None], "origin": "old"}


def _judge(enroll: Callable[[Message], None], written: Written, message: Message) -> None:
    """Consume a message and assert that it leaves the queue exactly once: as one job, or set aside with no job."""
    before = written.rows()
    enroll(message)
    assert message.answers == ["ack"], message.answers
    assert written.rows() - before in (0, 1)


def test_a_plain_message_of_an_old_producer_is_a_job(enroll: Any, written: Written) -> None:
    body = json.dumps([[1, 2], {}, {}]).encode()
    enroll(Message(body, _plain(0), {"priority": 0}, "application/json", "utf-8"))
    assert written.rows() == 1


@pytest.mark.parametrize("field", FIELDS)
def test_a_header_of_an_old_producer_s_message(enroll: Any, written: Written, field: str) -> None:
    body = json.dumps([[1, 2], {}, {}]).encode()
    for number, value in enumerate(CORPUS):
        headers = {**_plain(number), field: value}
        _judge(enroll, written, Message(body, headers, {}, "application/json", "utf-8"))


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_property_of_an_old_producer_s_message(enroll: Any, written: Written, name: str) -> None:
    body = json.dumps([[1, 2], {}, {}]).encode()
    for number, value in enumerate(CORPUS):
        _judge(enroll, written, Message(body, _plain(number), {name: value}, "application/json", "utf-8"))


@pytest.mark.long
@settings(hostile, max_examples=examples(1000))
@given(
    body=st.binary(max_size=60) | jsons().map(lambda value: json.dumps(value).encode()) | values(),
    headers=jsons()
    | st.dictionaries(st.sampled_from(FIELDS), values(), max_size=6).map(lambda fields: {**_plain(1), **fields}),
    properties=st.dictionaries(st.sampled_from(PROPERTIES), values(), max_size=4) | values(),
    content_type=st.just("application/json")
    | st.sampled_from(["application/x-python-serialize", "text/plain"])
    | values(),
    encoding=st.just("utf-8") | values(),
)
def test_any_message_in_the_default_queue(
    enroll: Any, written: Written, body: Any, headers: Any, properties: Any, content_type: Any, encoding: Any
) -> None:
    _judge(enroll, written, Message(body, headers, properties, content_type, encoding))


def test_a_body_that_is_a_number_takes_no_memory(
    enroll: Any, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(receiving, "set_aside", lambda raw, queue, reason, detail: reasons.append(detail))
    before = written.rows()
    enroll(Message(10_000, _plain(0), {"priority": 0}, "application/json", "utf-8"))
    assert (written.rows(), len(reasons)) == (before, 1)
    assert "text or bytes, not int" in reasons[0]


def test_nothing_hostile_is_left_in_the_keys_of_the_ledger(
    app: Celery, written: Written, redis_client: redis.Redis
) -> None:
    for value in TEXTS:
        with suppress(PlatformError):
            app.send_task(TASK, [value], task_id=value, resources={value: 1})
    redis_keys: Any = redis_client.keys()
    assert all(key.decode().isprintable() for key in redis_keys)
