"""Connections that break one by one, in a random order, while work flows."""

from __future__ import annotations

import random

import pytest
from sqlalchemy import text

from tests.faults.breaking.faults import World
from tests.faults.breaking.servers import postgres_connections, redis_connections
from tests.faults.judging.watching import Oracle
from tests.fixtures.jobs.submitting import Submitter

ROUNDS = 20


@pytest.mark.long
def test_every_connection_is_dropped_one_by_one_in_20_rounds(
    world: World, submitter: Submitter, oracle: Oracle
) -> None:
    chance = random.Random(5)
    for name in ("a", "b"):
        world.start(name, ready=True)
    client, engine = world.platform.redis, world.platform.engine
    with oracle.flow(submitter):
        for _ in range(ROUNDS):
            oracle.until_more(3)
            connections = [("redis", connection_id) for connection_id in redis_connections(client)]
            connections += [("postgres", str(pid)) for pid in postgres_connections(engine)]
            for server, connection_id in chance.sample(connections, len(connections)):
                if server == "redis":
                    client.client_kill_filter(_id=connection_id)
                else:
                    with engine.connect() as connection:
                        connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": int(connection_id)})
            oracle.until_more(1)
        oracle.whole_again("drop every connection, 20 rounds")
        oracle.until_more(10)
    oracle.assert_zeros()


@pytest.mark.long
def test_paths_to_the_servers_are_cut_and_restored_in_random_order(
    world: World, submitter: Submitter, oracle: Oracle
) -> None:
    chance = random.Random(6)
    for name in ("a", "b"):
        world.start(name, ready=True)
    paths = [world.redis_path, world.postgres_path]
    with oracle.flow(submitter):
        for _ in range(ROUNDS // 4):
            oracle.until_more(5)
            for path in chance.sample(paths, 2):
                path.refuse()
            for path in chance.sample(paths, 2):
                path.restore()
        oracle.whole_again("cut the paths to both servers")
        oracle.until_more(10)
    oracle.assert_zeros()
