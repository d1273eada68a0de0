"""Routing Tasks: the queue of a job, and the workers that take it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, chain
from celery.exceptions import QueueNotFound
from kombu import Exchange, Queue
from kombu.common import Broadcast
from sqlalchemy import Engine, text

from celery_capacity import InvalidRequest, Unsupported, create_app
from celery_capacity.routing.config.embedded import Pair
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.inspect.explain import explain
from celery_capacity.routing.ledger import keys
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.reasons import Reason
from tests.fixtures import tasks
from tests.fixtures.jobs.submitting import Submitter, standing_platform
from tests.fixtures.processes.platforms import Platform
from tests.fixtures.waiting import until
from tests.tasks import routed

ADD = "tests.fixtures.tasks.add"
HOLD = "tests.fixtures.tasks.hold"
ROUTED = "tests.tasks.routed"

MEDIA = Exchange("media", type="topic")
#: The queues of a user: by a name alone, by a topic, by a key of a direct exchange.
QUEUES = [
    Queue("celery"),
    Queue("films", MEDIA, routing_key="video.#"),
    Queue("stills", MEDIA, routing_key="*.still"),
    Queue("letters", Exchange("post"), routing_key="letter"),
    Broadcast("everybody"),
]


# -- where a call goes


class Sender:
    """Submit jobs by an app on stores that no worker looks at, and read their rows."""

    def __init__(self, app: Celery, engine: Engine) -> None:
        self.app = app
        self._engine = engine

    def send(self, **options: Any) -> Any:
        """Send a job and return its row."""
        return self.row(self.app.send_task(ADD, [1, 2], **options).id)

    def row(self, job: str) -> Any:
        with self._engine.connect() as connection:
            return connection.execute(text("SELECT * FROM jobs WHERE id = :id"), {"id": job}).one()

    def jobs(self) -> int:
        with self._engine.connect() as connection:
            return int(connection.execute(text("SELECT count(*) FROM jobs")).scalar_one())


@pytest.fixture
def alone(settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sender]:
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    with create_app("theirs", resolve=lambda _: settings) as app:
        app.conf.task_queues = QUEUES
        yield Sender(app, engine)


@pytest.mark.parametrize(
    ("options", "queue"),
    [
        ({}, "celery"),
        ({"queue": "video"}, "video"),
        ({"queue": "Vidéo/hd:1"}, "Vidéo/hd:1"),
        ({"queue": Queue("mine", Exchange("mine"), "mine")}, "mine"),
        ({"queue": "films"}, "films"),
        ({"exchange": "media", "routing_key": "video.hd.long"}, "films"),
        ({"exchange": MEDIA, "routing_key": "dog.still"}, "stills"),
        ({"exchange": "post", "routing_key": "letter"}, "letters"),
        ({"exchange": "celery", "routing_key": "celery"}, "celery"),
    ],
    ids=str,
)
def test_the_call_says_where(alone: Sender, options: dict[str, Any], queue: str) -> None:
    row = alone.send(**options)
    assert row.queue == queue
    assert row.shape == "cpus=1000," + ("slots=1" if queue == "celery" else f"queue:{queue}=1,slots=1")
    # People see the queue, and no resource of it.
    assert row.request == {"cpus": 1, "slots": 1}


@pytest.mark.parametrize(
    "routes",
    [
        {ADD: "video"},
        {"tests.fixtures.*": {"queue": "video"}},
        [lambda name, *_, **__: {"queue": "video"} if name == ADD else None],
        {ADD: {"exchange": "media", "routing_key": "video.hd"}},
    ],
    ids=["a name", "a pattern", "a function", "an exchange"],
)
def test_the_routes_of_the_user_say_where(alone: Sender, routes: Any) -> None:
    alone.app.conf.task_routes = routes
    assert alone.send().queue in ("video", "films")
    # The queue of the call wins, and the call's other options stay.
    if "exchange" in str(routes):
        return  # An exchange of the route wins over a queue of the call, as with Celery.
    row = alone.send(queue="other", cpus=3, priority=4)
    assert (row.queue, row.request["cpus"], row.priority) == ("other", 3, 4)


def test_the_task_and_the_default_say_where(alone: Sender) -> None:
    assert alone.row(alone.app.tasks[routed.at_home.name].delay().id).queue == "video"
    # Celery reads these settings once.
    alone.app.__dict__.pop("amqp")
    alone.app.conf.update(task_default_queue="main", task_queues=None)
    row = alone.send()
    assert (row.queue, row.shape) == ("main", "cpus=1000,queue:main=1,slots=1")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"queue": "everybody"}, Unsupported, "fanout: a job is one"),
        ({"queue": Queue("x", Exchange("h", type="headers"))}, Unsupported, "headers: a job is one"),
        ({"exchange": "media", "routing_key": "video.still"}, Unsupported, "leads to 2 queues: films, stills"),
        ({"exchange": "media", "routing_key": "sound"}, InvalidRequest, "no queue is bound to exchange 'media'"),
        ({"exchange": "none", "routing_key": "x"}, InvalidRequest, "no queue is bound to exchange 'none'"),
        ({"queue": "a b"}, InvalidRequest, "queue 'a b' is not valid"),
        ({"queue": "a=1"}, InvalidRequest, "'a=1'"),
        ({"queue": "a,b"}, InvalidRequest, "'a,b'"),
        ({"queue": "a\n"}, InvalidRequest, "is not valid"),
        ({"queue": ""}, InvalidRequest, "is not valid"),
        ({"queue": "x" * 101}, InvalidRequest, "is not valid"),
        ({"queue": 7}, InvalidRequest, "is not valid"),
        ({"resources": {"queue:video": 1}}, InvalidRequest, "'queue:video'"),
    ],
    ids=str,
)
def test_what_is_no_queue_is_refused(alone: Sender, options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as raised:
        alone.send(**options)
    assert getattr(raised.value, "advice", "")
    assert alone.jobs() == 0


def test_a_queue_that_is_missing_and_not_to_be_made(alone: Sender) -> None:
    alone.app.conf.task_create_missing_queues = False
    with pytest.raises(QueueNotFound):
        alone.send(queue="missing")
    assert alone.jobs() == 0


# -- who takes it


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield a platform where `both` serves the default queue and video, and `mail` serves only mail."""
    with standing_platform(server_pair, tmp_path_factory.mktemp("queues"), ROUTED) as running:
        running.worker("both", cpus=2, pool="threads", arguments=("-Q", "celery,video"), ready=False)
        running.worker("mail", cpus=2, pool="threads", arguments=("-Q", "mail"))
        running.processes[0].wait_for(" ready.")
        yield running


def ran_on(submitter: Submitter, job: str) -> tuple[str, str]:
    row = submitter.ended(job)
    assert row.state == "succeeded", row.error
    return row.worker, row.queue


def test_a_job_runs_where_its_queue_is_served(submitter: Submitter) -> None:
    jobs = {queue: [submitter.send(ADD, 1, n, queue=queue) for n in range(3)] for queue in ("celery", "video", "mail")}
    for queue, jobs_of_queue in jobs.items():
        worker = "mail" if queue == "mail" else "both"
        assert [ran_on(submitter, job) for job in jobs_of_queue] == [(worker, queue)] * 3
    # A label is no capacity, so none is left allocated.
    assert submitter.allocated_cpus() == "0"
    with submitter.platform.engine.connect() as connection:
        rows: dict[str, Any] = dict(connection.execute(text("SELECT name, capacity FROM workers")).all())
    assert {name: rows[name].get("queues") for name in rows} == {"both": ["celery", "video"], "mail": ["mail"]}
    book: Any = submitter.platform.redis.hgetall(keys.book("mail"))
    shape = Capacity.from_people(rows["mail"]).shape
    assert shape == ",".join(sorted(f"{k[2:].decode()}={v.decode()}" for k, v in book.items() if k[:2] == b"c."))


def test_retries_replacements_and_chains_go_where_they_say(submitter: Submitter) -> None:
    stays = submitter.send(f"{ROUTED}.moves", queue="mail")
    moves = submitter.send(f"{ROUTED}.moves", "mail", queue="video")
    returns = submitter.send(f"{ROUTED}.moves", "celery", queue="mail")
    replaced = submitter.send(f"{ROUTED}.replaced", "mail")
    where = submitter.app.signature(f"{ROUTED}.where", immutable=True)
    last = chain(where.clone(), where.clone().set(queue="mail")).apply_async()
    assert (submitter.value(stays), ran_on(submitter, stays)) == ("mail", ("mail", "mail"))
    assert (submitter.value(moves), ran_on(submitter, moves)) == ("mail", ("mail", "mail"))
    assert (submitter.value(returns), ran_on(submitter, returns)) == ("celery", ("both", "celery"))
    assert submitter.value(replaced) == "mail"
    assert (last.parent.get(timeout=60), last.get(timeout=60)) == ("celery", "mail")
    assert ran_on(submitter, last.id) == ("mail", "mail")


def why(submitter: Submitter, job: str) -> Any:
    with submitter.platform.engine.connect() as connection:
        return explain(submitter.platform.redis, connection, job)


def active(submitter: Submitter) -> dict[str, list[str]]:
    """Return the queues that workers say they serve."""
    answers = submitter.app.control.inspect(timeout=60, limit=2).active_queues() or {}
    return {name.partition("@")[0]: [queue["name"] for queue in queues] for name, queues in answers.items()}


def test_workers_come_to_serve_a_queue_and_leave_it_while_they_run(submitter: Submitter) -> None:
    control, client = submitter.app.control, submitter.platform.redis
    assert active(submitter) == {"both": ["celery", "video"], "mail": ["mail"]}
    waits = submitter.send(ADD, 1, 2, queue="late")
    submitter.until(waits, "waiting")
    explanation = why(submitter, waits)
    assert (explanation.why, explanation.large_enough, explanation.live_workers) == (Reason.NO_QUEUE, 0, 2)
    output = submitter.platform.celery("job", waits).stdout
    assert "No worker serves queue late." in output
    assert "queue     late" in output
    assert "cpus" not in output

    (mail,) = [name for name in control.inspect(timeout=60, limit=2).ping() if name.startswith("mail@")]
    refused = control.add_consumer("bad", exchange_type="fanout", destination=[mail], reply=True, timeout=60, limit=1)
    assert "a job is one" in refused[0][mail]["error"]
    assert "ok" in control.add_consumer("late", destination=[mail], reply=True, timeout=60, limit=1)[0][mail]
    assert ran_on(submitter, waits) == ("mail", "late")
    assert active(submitter)["mail"] == ["late", "mail"]

    # A worker that leaves a queue keeps its running jobs of it. It takes jobs of its other queues beside them.
    runs = submitter.send(HOLD, "gate", queue="late")
    tasks.started(client, "gate")
    control.cancel_consumer("late", destination=[mail], reply=True, timeout=60, limit=1)
    left = submitter.send(ADD, 1, 2, queue="late")
    until(lambda: active(submitter)["mail"] == ["mail"], "the queue is left")
    until(lambda: why(submitter, left).why is Reason.NO_QUEUE, "nobody serves it")
    assert ran_on(submitter, submitter.send(ADD, 1, 2, queue="mail")) == ("mail", "mail")
    submitter.until(left, "waiting")
    tasks.let_go(client, "gate")
    assert ran_on(submitter, runs) == ("mail", "late")
    control.add_consumer("late", destination=[mail], reply=True, timeout=60, limit=1)
    assert ran_on(submitter, left) == ("mail", "late")
    control.cancel_consumer("late", destination=[mail], reply=True, timeout=60, limit=1)
    until(lambda: active(submitter)["mail"] == ["mail"], "as it was")


def test_the_cluster_shows_queues_and_no_labels(submitter: Submitter) -> None:
    waits = submitter.send(ADD, 1, 2, queue="nowhere", cpus=2)
    submitter.until(waits, "waiting")
    shown = submitter.platform.celery("cluster").stdout
    assert "celery, video" in shown
    assert "nowhere" in shown
    assert "queue:" not in shown
    submitter.app.control.revoke(waits)
    assert submitter.ended(waits).state == "cancelled"


def test_a_worker_that_is_to_serve_what_no_worker_can(submitter: Submitter) -> None:
    done = submitter.platform.celery("worker", "-Q", "a=b", "--pool", "solo", NODE_NAME="odd")
    assert done.returncode != 0
    assert "queue 'a=b' is not valid" in done.stderr
