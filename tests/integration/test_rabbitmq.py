"""RabbitMQ, of Debian's package, as Celery's broker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from celery import Celery

from routing.states import FINAL
from tests.fixtures import garbage
from tests.fixtures.processes import Platform, Pool
from tests.fixtures.setting_aside import job_states, number_set_aside
from tests.fixtures.submitting import RESULT_WITHIN, Submitter, platform_with_broker
from tests.fixtures.waiting import until

ADD = "tests.fixtures.tasks.add"


@pytest.fixture
def rabbitmq(tmp_path: Path) -> Iterator[str]:
    """The URL of a RabbitMQ of Debian's package that is this test's own, and so is Erlang's register of names."""
    program = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    if not program.exists():
        pytest.fail("RabbitMQ is not installed (Debian: apt-get install rabbitmq-server)", pytrace=False)
    port, beside, register = free_ports(3)
    folder = tmp_path / "rabbitmq"
    folder.mkdir()
    environment = {
        **os.environ,
        "HOME": str(folder),
        "ERL_EPMD_PORT": str(register),
        "RABBITMQ_NODENAME": f"test{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(beside),
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
    }
    with (folder / "said").open("wb") as said:
        started = [
            subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
            for command in (["epmd", "-address", "127.0.0.1", "-port", str(register)], [str(program)])
        ]
    url = f"amqp://guest:guest@127.0.0.1:{port}//"

    def answers() -> bool:
        assert started[-1].poll() is None, (folder / "said").read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return True
        return False

    try:
        until(answers, "RabbitMQ answers", 90)
        yield url
    finally:
        for process in reversed(started):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    with ExitStack() as held:
        return [
            held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)
        ]


@pytest.fixture
def platform(request: pytest.FixtureRequest, rabbitmq: str, tmp_path: Path) -> Iterator[Platform]:
    with platform_with_broker(request.getfixturevalue("server_pair"), tmp_path, rabbitmq) as running:
        yield running


@pytest.mark.rabbitmq
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_main_job_with_rabbitmq_as_the_broker(
    rabbitmq: str, platform: Platform, submitter: Submitter, pool: Pool
) -> None:
    worker = platform.worker("a", 4, pool)
    jobs = [submitter.send(ADD, number, 1, cpus=1 + number % 4) for number in range(12)]
    assert [submitter.value(job) for job in jobs] == list(range(1, 13))
    assert submitter.app.control.ping(timeout=5.0)
    packed = list(garbage.packed())
    plain = (b"garbage", b"[]", b"\xff")
    with Celery("old", broker=rabbitmq, backend=platform.settings.redis_url, set_as_current=False) as old:
        assert old.send_task(ADD, [40, 2], compression="gzip").get(timeout=RESULT_WITHIN) == 42
        with old.connection_for_write() as connection, connection.channel() as channel:
            for headers, body in packed:
                message = channel.prepare_message(body, 0, "application/json", "utf-8", headers)
                channel.basic_publish(message, exchange="", routing_key="celery")
            for body in plain:
                channel.basic_publish(channel.prepare_message(body), exchange="", routing_key="celery")
    before = submitter.view("a")["heartbeat_at"]
    platform.beat(PLATFORM_HEARTBEAT_INTERVAL="0.3")
    until(lambda: submitter.view("a")["heartbeat_at"] > before, "beat's tick is heard")
    until(
        lambda: number_set_aside(platform) == len(packed) + len(plain),
        lambda: f"what cannot be read is set aside: {number_set_aside(platform)}",
    )
    until(lambda: job_states(platform).keys() <= set(FINAL), "all is over")
    assert submitter.value(submitter.send(ADD, 1, 2)) == 3
    assert worker.alive
