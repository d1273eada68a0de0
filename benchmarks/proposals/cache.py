"""Free CPUs in Redis alone: one script takes them, and no other place knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import redis

from benchmarks.proposals.way import ASKED, CPUS, Cluster, Held

#: Sorted set: worker, free CPUs.
FREE: Final = "cache:free"
#: String: CPUs taken in all.
TAKEN: Final = "cache:taken"

_ADMIT: Final = """
local found = redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], '+inf', 'LIMIT', 0, 1)
if not found[1] then
  return nil
end
redis.call('ZINCRBY', KEYS[1], -ARGV[1], found[1])
redis.call('INCRBY', KEYS[2], ARGV[1])
return found[1]
"""


class Cache:
    """The smallest cache that cannot overcommit by a race.

    A worker that the cache does not hold counts as free, as in a cache that fills a miss from the configuration: no
    other place knows the running jobs.
    """

    def __init__(self, redis_url: str, workers: list[str] | None = None) -> None:
        self._url = redis_url
        self._client: Any = redis.Redis.from_url(redis_url)
        self._admit = self._client.register_script(_ADMIT)
        self._workers = workers or []

    def load(self, cluster: Cluster) -> None:
        self._workers = cluster.names
        self._client.flushdb()
        self._client.zadd(FREE, {name: CPUS - held for name, held in cluster.held.items()})
        self._client.set(TAKEN, cluster.running * ASKED)

    def apart(self) -> Cache:
        return Cache(self._url, self._workers)

    def taken(self) -> int:
        return int(self._client.get(TAKEN) or 0)

    def free(self) -> Mapping[str, int]:
        return {name.decode(): int(free) for name, free in self._client.zrange(FREE, 0, -1, withscores=True)}

    def admit(self) -> Held | None:
        worker = self._admit(keys=[FREE, TAKEN], args=[ASKED])
        return None if worker is None else Held(worker.decode())

    def release(self, held: Held) -> None:
        pipe = self._client.pipeline()
        pipe.zincrby(FREE, ASKED, held.worker)
        pipe.decrby(TAKEN, ASKED)
        pipe.execute()

    def beat(self, worker: str) -> None:
        """Do nothing: the set does not know that workers live."""

    def watch(self) -> None:
        """Do nothing: nobody looks."""

    def empty(self) -> None:
        self._client.flushdb()

    def recover(self) -> int:
        self._client.zadd(FREE, dict.fromkeys(self._workers, CPUS), nx=True)
        return 0

    def close(self) -> None:
        self._client.close()
