"""Commands are what the driver makes of them, in one piece."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import pytest
import redis
from redis.exceptions import DataError

from celery_capacity.routing.ledger.connection import connect
from celery_capacity.routing.redis_commands import CommandPacker


class Word(StrEnum):
    GET = "get"


COMMANDS: list[tuple[Any, ...]] = [
    ("PING",),
    ("CONFIG GET", "maxmemory"),
    (b"CONFIG GET", b"maxmemory"),
    ("SET", "ключ", b"\x00\xff\r\n", "PX", 10),
    ("ZADD", "key", 1.5, Word.GET, -3, "", 2**60),
    ("SET", memoryview(b"a"), b"x" * 20_000),
    ("EVALSHA", "0" * 40, 0, *range(900)),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command[0]))
def test_command_is_the_drivers_in_one_piece(command: tuple[Any, ...]) -> None:
    (packed,) = CommandPacker().pack(*command)
    driver: Any = redis.Connection
    assert packed == b"".join(driver().pack_command(*command))


@pytest.mark.parametrize("value", [None, True, ["a"], {}])
def test_value_of_another_type_is_refused_as_by_the_driver(value: Any) -> None:
    with pytest.raises(DataError, match=type(value).__name__):
        CommandPacker().pack("SET", "key", value)


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:1/0", "unix:///nowhere/redis.sock", "sentinel://127.0.0.1:1/0?master_name=main"]
)
def test_connection_of_the_ledger_sends_one_piece(url: str) -> None:
    pool = connect(url).connection_pool
    connection = pool.connection_class(**pool.connection_kwargs)
    assert len(connection.pack_command("SET", "key", b"x" * 20_000, "y" * 20_000)) == 1


@pytest.mark.skipif(not hasattr(redis, "DriverInfo"), reason="this redis-py has no DriverInfo")
@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "redis+socket:///nowhere.sock?virtual_host=0"])
def test_connection_looks_for_no_version_of_the_driver(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(name: str) -> str:
        raise AssertionError(f"the version of {name} was read again")

    monkeypatch.setattr("redis.utils.metadata.version", look_up)

    connection: Any = connect(url).connection_pool.make_connection()

    assert connection.driver_info.formatted_name == "redis-py"
    assert connection.driver_info.lib_version == redis.__version__
