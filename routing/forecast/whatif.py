"""Copy of the cluster for a question "what if", from both stores. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import redis as redispy
from redis.exceptions import RedisError
from sqlalchemy import Connection

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.authority import read_authority
from celery_capacity.routing.errors import InvalidRequest
from celery_capacity.routing.forecast.cluster import TooLarge, live_books, read_cluster
from celery_capacity.routing.forecast.shares import read_shares
from celery_capacity.routing.forecast.starts import rules_of
from celery_capacity.routing.ledger import snapshot
from celery_capacity.routing.model.states import Store
from celery_capacity.routing.policy.reservation import Rules
from celery_capacity.routing.simulation.forecast import Cluster, with_guesses

#: Waiting jobs that a question takes, the first in order: some seconds on a few workers.
MAX_JOBS: Final = 5000


@dataclass(frozen=True, slots=True)
class Today:
    """The cluster as it is. `rules`: those by which jobs start. `guess`: milliseconds of each unknown run time.

    `source`: the store that decides. `tasks_known`: False where the workers' tasks were not read, so that each worker
    is taken to know all.
    """

    cluster: Cluster
    rules: Rules
    guess: int
    source: Store
    tasks_known: bool


def read_today(client: redispy.Redis, connection: Connection, settings: Settings) -> Today:
    """Return the cluster as it is, under both authorities. Raise `InvalidRequest` where it is too large."""
    source = read_authority(connection).authority
    rules = rules_of(settings)
    try:
        books = live_books(connection, settings.worker_ttl)
        shares = read_shares(connection, client if source == Store.LEDGER else None, settings.share_halves_in)
        cluster = read_cluster(connection, books, settings.most_losses, most=MAX_JOBS, shares=shares)
    except TooLarge:
        raise InvalidRequest(
            "the cluster is too large for a forecast: more than 5,000 workers, 20,000 running jobs or 1,000 tenants",
            value=None,
            advice="Look at it by `cluster`, or simulate its jobs: celery -A platform simulate",
        ) from None
    cluster, guess = with_guesses(cluster)
    tasks_known = source == Store.LEDGER
    try:
        cluster = _with_tasks(client, cluster) if tasks_known else cluster
    except RedisError:
        tasks_known = False
    return Today(cluster, rules, guess, source, tasks_known)


def _with_tasks(client: redispy.Redis, cluster: Cluster) -> Cluster:
    """Return the cluster with the tasks that its workers have registered. Raises `RedisError`."""
    tasks = {queued.waiting.task for queued in cluster.waiting} - {""}
    ledger = snapshot.read_books(client, cluster.books)
    catalogues = {name: book.catalogue for name, book in ledger.items() if book.catalogue}
    knowing = snapshot.read_catalogues(client, set(catalogues.values()), tasks)
    books = {
        name: replace(book, tasks=knowing[catalogues[name]]) if name in catalogues else book
        for name, book in cluster.books.items()
    }
    return replace(cluster, books=books)
