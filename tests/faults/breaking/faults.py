"""Ways to begin and to undo each kind of fault, on a platform that is reached through proxies."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import psutil
import psycopg2
import redis
from sqlalchemy import create_engine, make_url, text

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import keys
from tests.faults.breaking import servers as on_servers
from tests.faults.breaking.seams import Seam
from tests.faults.breaking.servers import CONNECTIONS, Servers
from tests.faults.judging.watching import Oracle
from tests.faults.plan import LABEL, WORKERS, Fault
from tests.fixtures.processes.platforms import READY, Platform, Process
from tests.fixtures.servers.pair import ANSWER_WITHIN, empty_database, empty_redis, environment_of
from tests.fixtures.servers.proxy import Proxy
from tests.fixtures.waiting import until

IMPORTS: Final = (
    "tests.tasks.canvas",
    "tests.tasks.ends",
    "tests.tasks.quick",
    "tests.tasks.seams",
    "tests.tasks.traced",
)
#: Messages that are not Celery's.
GARBAGE: Final = (
    b"garbage",
    b"[]",
    b"null",
    b"42",
    b'"text"',
    b"{}",
    b"\xff\xfe\x00",
    b'{"body": 1, "headers": {}, "properties": {}}',
    b'{"body": "e30=", "content-type": "application/x-python-serialize", "content-encoding": "binary",'
    b' "headers": {"id": "x", "task": "y"}, "properties": {"delivery_tag": "x:1.1", "body_encoding": "base64",'
    b' "delivery_info": {"exchange": "", "routing_key": "celery"}}}',
)
#: Seconds for a worker that was asked to end. The jobs that it runs take far less.
ENDS_WITHIN: Final = 20.0
#: Bytes of the trace that are some twenty bodies, and seconds that they may take.
SOME_WORK: Final = 8_000
WORKS_WITHIN: Final = 2.0
#: Number of looks at the queues for messages that are on their way.
LOOKS: Final = 200


class World:
    """A platform, its servers, and its workers by name."""

    def __init__(self, servers: Servers, platform: Platform, oracle: Oracle, paths: tuple[Proxy, Proxy]) -> None:
        self.servers = servers
        self.platform = platform
        self.oracle = oracle
        self.redis_path, self.postgres_path = paths
        self.workers: dict[str, Process] = {}
        #: Workers that end and are started again afterwards: by name, with the moment at which a slow one is killed.
        self.leaving: dict[str, float] = {}
        self.beat: Process | None = None
        #: The clocks and heartbeats of the workers, by name.
        self.seams: dict[str, Seam] = {}
        #: Programs that submit jobs, by the prefix of their jobs.
        self.clients: dict[str, Process] = {}

    def start(self, name: str, ready: bool = False) -> Process:
        cpus, pool, side = next(line[1:] for line in WORKERS if line[0] == name)
        seam = self.seams.setdefault(name, Seam(self.platform.folder / f"seam-{name}"))
        environment = {"STEP_BY_FILE": str(seam.path), "PLATFORM_LABELS": f"{LABEL}={side}"}
        worker = self.platform.worker(name, cpus, pool, ready=ready, **environment)  # type: ignore[arg-type]
        self.workers[name] = worker
        return worker

    def tend(self) -> list[str]:
        """Start ended workers again, and return a line for each that ended unasked."""
        unasked = []
        for name, worker in self.workers.items():
            if worker.alive or self.leaving.get(name) == math.inf:
                if time.monotonic() > self.leaving.get(name, math.inf):
                    worker.kill()
                continue
            if name not in self.leaving:
                unasked.append(f"{name} ended with {worker.process.returncode}")
            self.leaving.pop(name, None)
            self.start(name)
        return unasked

    @contextmanager
    def broken(self, kind: str, seconds: float = 0.0, worker: str = "") -> Iterator[None]:
        """Yield while a fault lasts: for so many seconds, and at the least for the block.

        Afterwards the fault is undone, and healing begins.
        """
        until_then = threading.Event()
        began = time.monotonic()
        way = begin(self, Fault(kind, 0.0, seconds, worker, zlib.crc32(kind.encode())))
        yield
        until_then.wait(max(0.0, began + seconds - time.monotonic()))
        end(way)
        self.oracle.whole_again(kind)

    def kill_beat(self) -> None:
        if self.beat is not None:
            self.oracle.asked(self.beat)
            self.beat.kill()
            self.beat = None


@contextmanager
def world(servers: Servers, folder: Path, **settings: str) -> Iterator[World]:
    """Yield a platform whose workers and submitters reach both servers through proxies.

    The test itself connects directly. `settings`: settings of the platform, beside the usual ones.
    """
    with ExitStack() as stack:
        database_url = stack.enter_context(empty_database(servers.pair))
        redis_url = stack.enter_context(empty_redis(servers.pair))
        paths = (Proxy(redis_url), Proxy(database_url))
        for path in paths:
            stack.callback(path.stop)
        environment = {**environment_of(paths[0].url, paths[1].url, folder), "PLATFORM_IMPORTS": ",".join(IMPORTS)}
        environment |= settings
        engine = create_engine(database_url, pool_pre_ping=True)
        stack.callback(engine.dispose)
        client = stack.enter_context(redis.Redis.from_url(redis_url, socket_timeout=ANSWER_WITHIN))
        platform = Platform(Settings.from_environ(environment), environment, folder, engine, client)
        stack.callback(platform.stop)
        yield World(servers, platform, Oracle(platform, folder / "trace"), paths)


#: A fault as a generator: the code before the yield breaks something, the code after the yield undoes the fault.
Way = Callable[[World, Fault], Generator[None, None, None]]


def begin(world: World, fault: Fault) -> Generator[None, None, None]:
    """Begin a fault and return its generator, whose next step undoes the fault."""
    way = WAYS[fault.kind](world, fault)
    next(way)
    return way


def end(way: Generator[None, None, None]) -> None:
    with suppress(StopIteration):
        next(way)


# -- workers


def _children(worker: Process) -> list[psutil.Process]:
    try:
        return psutil.Process(worker.pid).children(recursive=True)
    except psutil.Error:
        return []


def _kill_child(world: World, fault: Fault) -> Generator[None, None, None]:
    children = _children(world.workers[fault.worker])
    if children:
        with suppress(psutil.NoSuchProcess):
            random.Random(fault.chance).choice(children).kill()
    yield


def _ends(world: World, fault: Fault, how: Callable[[Process], None]) -> Generator[None, None, None]:
    worker = world.workers[fault.worker]
    world.oracle.asked(worker)
    how(worker)
    # Do not start the worker again before the fault is over.
    world.leaving[fault.worker] = math.inf
    yield
    world.leaving[fault.worker] = time.monotonic() + ENDS_WITHIN


def _signalled(signum: signal.Signals) -> Way:
    def way(world: World, fault: Fault) -> Generator[None, None, None]:
        return _ends(world, fault, lambda worker: worker.signal(signum))

    return way


def _kill_group(world: World, fault: Fault) -> Generator[None, None, None]:
    return _ends(world, fault, Process.kill)


def _stop_main(world: World, fault: Fault) -> Generator[None, None, None]:
    worker = world.workers[fault.worker]
    worker.signal(signal.SIGSTOP)
    yield
    worker.signal(signal.SIGCONT)


def _stop_group(world: World, fault: Fault) -> Generator[None, None, None]:
    worker = world.workers[fault.worker]
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGSTOP)
    yield
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGCONT)


def _twin(world: World, fault: Fault) -> Generator[None, None, None]:
    # If the worker itself is being started just now, two lives begin at once, and either may be refused.
    lines = world.workers[fault.worker].lines
    if len(lines) == lines.maxlen or any(READY in line for line in list(lines)):
        twin = world.platform.worker(fault.worker, 1, "threads", ready=False)
        world.oracle.asked(twin)
    yield


def _kill_beat(world: World, fault: Fault) -> Generator[None, None, None]:
    world.kill_beat()
    yield
    world.beat = world.platform.start("beat", "beat", "--schedule", str(world.platform.folder / "schedule"))


# -- Redis


def _kill_redis(world: World, fault: Fault) -> Generator[None, None, None]:
    world.servers.forget_dump()
    world.servers.kill_redis()
    yield
    world.servers.start_redis()
    world.oracle.results_were_lost()


def _old_dump(world: World, fault: Fault) -> Generator[None, None, None]:
    with world.servers.admin() as client:
        client.save()
    before = world.oracle.bytes_written()
    # The dump must be old: work goes on before Redis dies.
    with suppress(AssertionError):
        until(lambda: world.oracle.bytes_written() > before + SOME_WORK, "work goes on", WORKS_WITHIN)
    world.servers.kill_redis()
    yield
    world.servers.start_redis()
    world.servers.forget_dump()
    world.oracle.results_were_lost()


def empty_redis_now(world: World) -> None:
    """Empty Redis as soon as it answers: a fault before may have ended its server only just."""

    def emptied() -> bool:
        with suppress(redis.ConnectionError):
            return bool(world.platform.redis.flushall())
        return False

    until(emptied, "Redis is emptied")
    world.oracle.results_were_lost()


def _empty(world: World, fault: Fault) -> Generator[None, None, None]:
    empty_redis_now(world)
    yield


def _half(world: World, fault: Fault) -> Generator[None, None, None]:
    on_servers.delete_half(world.platform.redis, random.Random(fault.chance))
    world.oracle.results_were_lost()
    yield


def _read_only(world: World, fault: Fault) -> Generator[None, None, None]:
    with world.servers.admin() as client:
        on_servers.make_read_only(client)
        yield
        on_servers.make_writable(client)


def _full(world: World, fault: Fault) -> Generator[None, None, None]:
    with world.servers.admin() as client:
        client.config_set("maxmemory", "1")
        yield
        client.config_set("maxmemory", "0")


def _slow(world: World, fault: Fault) -> Generator[None, None, None]:
    world.redis_path.delay(2.0)
    yield
    world.redis_path.restore()


def _half_open_redis(world: World, fault: Fault) -> Generator[None, None, None]:
    world.redis_path.swallow()
    yield
    world.redis_path.restore()


def _drop_redis(world: World, fault: Fault) -> Generator[None, None, None]:
    world.redis_path.reset()
    yield


# -- Postgres


def _kill_postgres(world: World, fault: Fault) -> Generator[None, None, None]:
    world.servers.kill_postgres()
    world.platform.engine.dispose()
    yield
    world.servers.start_postgres()


def _lock_table(world: World, fault: Fault) -> Generator[None, None, None]:
    engine = world.servers.sessions(str(world.platform.engine.url.database))
    with engine.connect().execution_options(isolation_level="READ COMMITTED") as connection, connection.begin():
        connection.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
        yield


def _use_up_connections(world: World, fault: Fault) -> Generator[None, None, None]:
    """End the platform's connections, and take all connections that Postgres has."""
    engine = world.servers.sessions(str(world.platform.engine.url.database))
    url = make_url(world.servers.pair.database_url)
    taken: list[Any] = []
    on_servers.drop_postgres(engine)
    with suppress(psycopg2.OperationalError):
        while len(taken) < CONNECTIONS:
            taken.append(psycopg2.connect(host=url.query["host"], user=url.username, dbname="postgres"))
    yield
    for connection in taken:
        connection.close()


def _half_open_postgres(world: World, fault: Fault) -> Generator[None, None, None]:
    world.postgres_path.swallow()
    yield
    world.postgres_path.restore()


def _drop_postgres(world: World, fault: Fault) -> Generator[None, None, None]:
    world.postgres_path.reset()
    yield


# -- messages


def queues(client: redis.Redis) -> list[str]:
    """Return the private queues of the registered workers."""
    names = [client.hget(key, "queue") for key in client.scan_iter(match=keys.KEYS["book"] + "*")]
    return sorted(queue.decode() for queue in names if isinstance(queue, bytes) and queue)


def _garbage(world: World, fault: Fault) -> Generator[None, None, None]:
    client = world.platform.redis
    with suppress(redis.RedisError):
        for queue in [*queues(client), "celery"]:
            client.lpush(queue, *random.Random(fault.chance).sample(GARBAGE, 3))
    yield


def _twice(world: World, fault: Fault) -> Generator[None, None, None]:
    """Triple each message that is met on its way."""
    client = world.platform.redis
    with suppress(redis.RedisError):
        queue_names = queues(client)
        for _ in range(LOOKS):
            for queue in queue_names:
                messages: Any = client.lrange(queue, 0, 3)
                if messages:
                    client.rpush(queue, *messages, *messages)
    yield


#: `tests.faults.breaking.lasting` and `.processes` add faults that outlast a lease or touch processes.
WAYS: Final[dict[str, Way]] = {
    "kill a child": _kill_child,
    "kill a worker's main process": _signalled(signal.SIGKILL),
    "kill a worker with all its processes": _kill_group,
    "TERM to a worker": _signalled(signal.SIGTERM),
    "QUIT to a worker": _signalled(signal.SIGQUIT),
    "stop a worker's main process": _stop_main,
    "stop a worker's main process for longer than each lease": _stop_main,
    "stop a worker with all its processes": _stop_group,
    "stop a worker with all its processes for longer than each lease": _stop_group,
    "start a worker's twin": _twin,
    "kill beat": _kill_beat,
    "kill Redis, back empty": _kill_redis,
    "kill Redis, back from an old dump": _old_dump,
    "empty Redis": _empty,
    "delete half of the keys": _half,
    "Redis is read-only": _read_only,
    "Redis is full": _full,
    "Redis is slow by 2 s": _slow,
    "Redis is half open": _half_open_redis,
    "drop all connections to Redis": _drop_redis,
    "kill Postgres": _kill_postgres,
    "lock the table of jobs": _lock_table,
    "Postgres is away for longer than a tombstone": _kill_postgres,
    "use up the connections of Postgres": _use_up_connections,
    "Postgres is half open": _half_open_postgres,
    "drop all connections to Postgres": _drop_postgres,
    "push garbage": _garbage,
    "push messages twice": _twice,
}
