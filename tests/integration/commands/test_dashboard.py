"""The dashboard over HTTP: one prepared value, read only, errors as problems."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import urllib.error
import urllib.request
from typing import Any

import pytest

from celery_capacity.platform.web.http import security
from celery_capacity.platform.web.prepared import MAX_AGE, Prepared
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.inspect import overview
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.servers.web import Fetch, serve
from tests.fixtures.stores.staged import Stage


def _nothing() -> dict[str, Any]:
    return {"source": "ledger"}


def test_the_dashboard_answers_what_cluster_prints(stage: Stage) -> None:
    stage.worker("a", cpus=4000)
    stage.submit(cpus=500)

    def read() -> dict[str, Any]:
        return overview.read(stage.redis, stage.engine).to_json()

    async def ask(fetch: Fetch) -> Any:
        return await fetch("/api/v1/dashboard")

    answer = serve(read, ask)
    assert (answer.code, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.headers["Cache-Control"] == "no-store"
    seen = json.loads(answer.body)
    assert seen["resources"]["allocated_cpus"] == 0.5
    assert seen.keys() == read().keys()


def test_many_requests_at_once_read_the_stores_once() -> None:
    asked: list[str] = []
    everybody = threading.Event()

    def read() -> dict[str, Any]:
        asked.append(threading.current_thread().name)
        everybody.wait(60)
        return {"reads": len(asked)}

    async def ask(fetch: Fetch) -> Any:
        waiting = [asyncio.ensure_future(fetch("/api/v1/dashboard")) for _ in range(8)]
        # The loop serves while the stores are slow.
        assert (await fetch("/health")).code == 200
        everybody.set()
        return await asyncio.gather(*waiting)

    bodies = {answer.body for answer in serve(read, ask)}
    assert bodies == {b'{"reads": 1}'}
    assert "MainThread" not in asked


def test_a_value_that_is_too_old_is_read_again() -> None:
    now, reads = [0.0], [0]

    def read() -> dict[str, Any]:
        reads[0] += 1
        return {"reads": reads[0]}

    async def ask() -> list[bytes]:
        prepared = Prepared(read, lambda: now[0])
        bodies = [await prepared.body(), await prepared.body()]
        now[0] += MAX_AGE
        return [*bodies, await prepared.body()]

    assert asyncio.run(ask()) == [b'{"reads": 1}', b'{"reads": 1}', b'{"reads": 2}']


def test_store_without_answer_is_a_problem_and_the_next_request_reads_anew() -> None:
    failures = [StoreUnavailable("Postgres at postgresql://me:secret@db does not answer")]

    def read() -> dict[str, Any]:
        if failures:
            raise failures.pop()
        return _nothing()

    async def ask(fetch: Fetch) -> Any:
        return await fetch("/api/v1/dashboard"), await fetch("/api/v1/dashboard")

    failed, served = serve(read, ask)
    assert (failed.code, failed.headers["Content-Type"]) == (503, "application/problem+json")
    problem = json.loads(failed.body)
    assert problem["reference"] == "store-unavailable"
    assert "secret" not in failed.body.decode()
    assert served.code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", ["/api/v1/dashboard", "/health"])
def test_nothing_can_be_changed(method: str, path: str) -> None:
    async def ask(fetch: Fetch) -> Any:
        return await fetch(path, method=method)

    answer = serve(_nothing, ask)
    assert (answer.code, answer.headers["Content-Type"]) == (405, "application/problem+json")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("10.1.2.3", 200),
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        (socket.gethostname(), 200),
        ("evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1@evil.example", 400),
        ("evil.example#127.0.0.1", 400),
        ("::1", 421),
    ],
)
@pytest.mark.parametrize("path", ["/api/v1/dashboard", "/health"])
def test_only_a_host_of_its_own_is_answered(path: str, host: str, status: int) -> None:
    """A page whose name was made to lead to this machine by DNS rebinding reads nothing."""

    async def ask(fetch: Fetch) -> Any:
        return await fetch(path, headers={"Host": host})

    assert serve(_nothing, ask).code == status
    assert security.is_own(host, {"localhost", socket.gethostname().lower()}) == (status == 200)


@pytest.mark.parametrize("path", ["/api/v1/dashboard", "/health", "/nothing"])
def test_every_answer_says_what_a_browser_may_do_with_it(path: str) -> None:
    async def ask(fetch: Fetch) -> Any:
        return await fetch(path), await fetch(path, method="POST")

    for answer in serve(_nothing, ask):
        assert {name: answer.headers[name] for name in security.HEADERS} == security.HEADERS
        assert "Server" not in answer.headers
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_an_unknown_path_is_a_problem() -> None:
    async def ask(fetch: Fetch) -> Any:
        return await fetch("/nothing")

    answer = serve(_nothing, ask)
    assert answer.code == 404
    assert json.loads(answer.body) == {"type": "about:blank", "title": "Not Found", "status": 404}


def test_a_defect_is_a_problem_that_gives_nothing_away() -> None:
    def read() -> dict[str, Any]:
        raise KeyError("inner")

    async def ask(fetch: Fetch) -> Any:
        return await fetch("/api/v1/dashboard")

    answer = serve(read, ask)
    assert answer.code == 500
    assert json.loads(answer.body) == {"type": "about:blank", "title": "Internal Server Error", "status": 500}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_end(platform: Platform, number: signal.Signals) -> None:
    process = platform.start("dashboard", "dashboard", "--port", "0", says="/api/v1/dashboard")
    url = next(line.split()[-1] for line in process.lines if "/api/v1/dashboard" in line)
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert json.load(answer)["resources"]["active_workers"] == 0
    process.signal(number)
    assert process.process.wait(60) == 0
    assert not any("login" in line for line in process.lines)


def test_dashboard_refuses_other_address_without_token(platform: Platform) -> None:
    ended = platform.celery("dashboard", "--host", "0.0.0.0", "--port", "0")
    assert ended.returncode == 1
    assert "does not listen on 0.0.0.0 without a token" in ended.stderr
    assert "PLATFORM_TOKEN" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_dashboard_serves_other_address_with_token(platform: Platform) -> None:
    token = "0123456789abcdef"
    process = platform.start(
        "open", "dashboard", "--host", "0.0.0.0", "--port", "0", says="Page:", PLATFORM_TOKEN=token
    )
    url = next(line.split()[-1] for line in process.lines if "/api/v1/dashboard" in line)
    asked = urllib.request.Request(url.replace("0.0.0.0", "127.0.0.1"))
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(asked, timeout=60)
    asked.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert json.load(answer)["resources"]["active_workers"] == 0


def test_a_port_that_is_taken_is_told(platform: Platform) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = platform.celery("dashboard", "--port", str(port))
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "Traceback" not in ended.stderr
