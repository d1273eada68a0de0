"""Cache of messages, for calls that are alike.

Celery makes the message of each call anew: options, routes, headers, serialiser, signals. Two ordinary calls of a task
with the same options give the same message but for the id and the arguments. So the first calls go through Celery, and
a template of their message is kept. The next calls fill the template in, for a third of the time.

A call is ordinary where its message depends on three things alone: simple options, values that are filled in, and the
state of the task and the app. That state is looked at each time. All other calls go through Celery: with other options,
in a task that runs, while somebody listens to Celery's signals, with routers or classes of the app's own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter, is_
from types import FunctionType, MethodType
from typing import Any, Final, NamedTuple

from celery import Celery, Task, signals
from celery.app import amqp as celery_amqp
from celery.app import base as celery_base
from celery.app import routes as celery_routes
from celery.app import task as celery_task
from celery.local import maybe_evaluate

from celery_capacity.routing.config.task_rules import RERUN
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.insert.key_options import declares as limited
from celery_capacity.routing.model.identifiers import check_job_id
from celery_capacity.routing.model.job import NewJob
from celery_capacity.routing.model.message import HEADER, PLATFORM_PREFIX, Template, decode
from celery_capacity.routing.model.nesting import CANVAS_PREFIX, check_body
from celery_capacity.routing.model.request import CALL_OPTIONS, split_suffix
from celery_capacity.workers.broker.lazy_producer import SpareProducer
from celery_capacity.workers.process import attempts
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit import amqp as platform_amqp
from celery_capacity.workers.submit import validation
from celery_capacity.workers.submit.amqp import PlatformAMQP, origin
from celery_capacity.workers.submit.constraints import declares
from celery_capacity.workers.submit.encode import encode_body
from celery_capacity.workers.submit.groups import gathering_of
from celery_capacity.workers.submit.router import Router

#: Attributes of a task that Celery's own code and ours read for its message.
_OF_TASK: Final = attrgetter(
    *("__class__", "name", "_exec_options", "ignore_result", "time_limit", "soft_time_limit", "rate_limit"),
    *("_dump_pydantic_arguments", "cpus", "memory", "gpus", "resources", "expected", "tenant", "rerun"),
    *("unique", "unique_for", "limit", "rate", "requests", "where", "worker", "exclusive", "placement"),
)
#: Attributes of the app's AMQP that its messages depend on. The serialiser and the like belong to the sender, which
#: Celery makes once.
_OF_AMQP: Final = ("create_task_message", "send_task_message", "router", "queues", "default_queue")
#: Options with which a call may be ordinary, and the types of their values.
_OPTIONS: Final = frozenset(
    {"ignore_result", "priority", "queue", "serializer", "time_limit", "soft_time_limit", RERUN, *CALL_OPTIONS}
)
_SIMPLE: Final = frozenset({str, int, bool})
#: Kombu's serialiser that templates write with.
JSON: Final = "json"
#: Types of a request's amounts that cannot change while they are the same object.
_AMOUNTS: Final = frozenset({type(None), int, float, str})
#: Prefixes of tasks that take the request of the tasks they call, and of the platform's messages, which make no job.
_SPECIAL: Final = (CANVAS_PREFIX, PLATFORM_PREFIX)
#: Headers of a message to which nobody else has added one.
_HEADERS: Final = frozenset(
    {
        *("lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id"),
        *("parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers"),
        *("stamps", HEADER),
    }
)
#: Third part of the body of a task that nothing follows.
_NOTHING: Final = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
#: Kinds of calls that an app keeps, and how often one kind is learnt anew. A kind that changes all the time is not
#: worth it.
MAX_KINDS: Final = 1000
MAX_CHANGES: Final = 100

_APPLY_ASYNC: Final = Task.apply_async
_SHADOW_NAME: Final = Task.shadow_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kind:
    """Kind of calls, and the state in which they are alike.

    `first`: the job of one of these calls, without its message, which has the arguments. `learned`: the run time that
    was learned of its task.
    """

    state: tuple[Any, ...]
    first: NewJob
    template: Template
    ignored: Any
    routed: Mapping[str, Any]
    queue: Any
    queue_name: str
    learned: int


class _Call(NamedTuple):
    """An ordinary call. `learnt`: how often its kind was learnt. `kind`: None where there is no template for it now."""

    key: Any
    state: tuple[Any, ...]
    learnt: int
    amqp: Any
    kind: _Kind | None


class MessageCache:
    """The templates of one app. Thread-safe."""

    def __init__(self, app: Celery, stores: Stores) -> None:
        self._app = app
        self._stores = stores
        self._kinds: dict[Any, _Kind] = {}
        #: Kinds that were seen -> how often they were learnt.
        self._seen: dict[Any, int] = {}

    def apply_async(
        self, task: Any, plain: Callable[..., Any], args: Any, kwargs: Any, options: Mapping[str, Any]
    ) -> Any:
        """Submit a call by a template, or else by `plain`, the task's own method of Celery.

        Raises what `plain` raises.
        """
        call = self._look_up(task, plain, args, kwargs, options)
        if call is None:
            return plain(args, kwargs, **options)
        if call.kind is None:
            return self._submit_and_learn(call, task, plain, args, kwargs, options)
        if task.typing and hasattr(task, "__header__"):
            task.__header__(*(args or ()), **(kwargs or {}))
        app, kind, sender = self._app, call.kind, call.amqp.job_sender
        job_id, producer = options.get("task_id") or celery_base.uuid(), SpareProducer(app)
        try:
            with producer.connection._reraise_as_library_errors():
                if not kind.ignored:
                    app.backend.on_task_call(producer, job_id)
                with sender.in_time():
                    job = self._fill(kind.first, kind.template, job_id, args, kwargs)
                    sender.check_backlog(None, job.shape)
                    sender.store(job, None)
        except PlatformError as error:
            self._stores.tally.refuse(error)
            raise
        finally:
            producer.release()
        result = task.AsyncResult(job.id)
        result.ignored = kind.ignored
        return result

    def _look_up(
        self, task: Any, plain: Callable[..., Any], args: Any, kwargs: Any, options: Mapping[str, Any]
    ) -> _Call | None:
        """Return an ordinary call, with its kind where there is a template for it. None: the call goes by Celery."""
        if not self._is_ordinary(task, plain, args, kwargs, options):
            return None
        # The key has the type of a value, because True equals 1 and is written otherwise. It has the id of the task,
        # because a task's class may define equality. The state has the task itself.
        key = (id(task), *[(option, type(value), value) for option, value in options.items() if option != "task_id"])
        learnt = self._seen.get(key)
        if learnt is None:
            # A kind whose options differ each time comes only once.
            self._note(key, 0)
            return None
        amqp = self._app.amqp
        kind = self._kinds.get(key)
        try:
            state = self._state(task, amqp)
            is_alike = kind is not None and all(map(is_, state, kind.state)) and _goes_there(kind, amqp)
            is_as_long = kind is None or kind.learned == _learned(amqp, kind.first)
        except Exception:
            # A property of the task's own may raise, say. Where Celery meets the error too, Celery raises it.
            return None
        if is_alike and is_as_long:
            return _Call(key, state, learnt, amqp, kind)
        # Learned times change by themselves, however steady the calls are.
        learnt -= is_alike
        return _Call(key, state, learnt, amqp, None) if learnt < MAX_CHANGES and _is_plain_app(self._app) else None

    def _submit_and_learn(
        self, call: _Call, task: Any, plain: Callable[..., Any], args: Any, kwargs: Any, options: Mapping[str, Any]
    ) -> Any:
        """Submit a call by Celery, and keep a template of its message."""
        producer = SpareProducer(self._app)
        try:
            result = plain(args, kwargs, producer=producer, **options)
        finally:
            producer.release()
        try:
            if producer.job is not None and all(map(is_, call.state, self._state(task, call.amqp))):
                self._note(call.key, call.learnt + 1)
                self._learn(call, task, producer, args, kwargs, options)
        except Exception:
            # The job is accepted. A caller that gets an error sends it again. The error may be one that a signal
            # raises.
            logger.debug("no template of %s was made", task.name, exc_info=True)
        return result

    def _note(self, key: Any, times: int) -> None:
        if len(self._seen) >= MAX_KINDS and key not in self._seen:
            self._kinds.clear()
            self._seen.clear()
        self._seen[key] = times

    def _is_ordinary(self, task: Any, plain: Any, args: Any, kwargs: Any, options: Mapping[str, Any]) -> bool:
        """Return True if only the usual code of Celery and the platform takes part in this call."""
        app, conf = self._app, self._app.conf
        for option, value in options.items():
            if not (option == "task_id" or (option in _OPTIONS and type(value) in _SIMPLE)):
                return False
        return not (
            listens()
            or attempts.current() is not None
            or app.current_worker_task is not None
            or not _is_method(plain, _APPLY_ASYNC)
            or not _is_method(task.shadow_name, _SHADOW_NAME)
            or not isinstance(args or (), (list, tuple))
            or not isinstance(kwargs or {}, dict)
            or conf["task_always_eager"]
            or conf["task_send_sent_event"]
            or gathering_of(app.amqp) is not None
        )

    def _state(self, task: Any, amqp: Any) -> tuple[Any, ...]:
        """Return the objects on which the messages of a task's calls depend, besides their arguments and options.

        The messages are alike while each item is the same object.
        """
        # Read only what exists: Celery makes the rest in its own order, so that its errors come first.
        made, stores = vars(amqp), self._stores.made
        routes = made["router"].routes if "router" in made else ()
        return (
            len(routes),
            *routes,
            task,
            *_OF_TASK(task),
            amqp,
            *[made.get(name) for name in _OF_AMQP],
            celery_amqp.AMQP.as_task_v2,
            celery_routes.Router.route,
            self._app.send_task,
            type(self._app).send_task,
            *[self._app.conf[name] for name in ("task_default_queue", "task_time_limit", "task_soft_time_limit")],
            stores.get("settings"),
            stores.get("requests"),
        )

    def _fill(
        self, first: NewJob, template: Template, job: Any, args: Any, kwargs: Any, may_ask: bool = True
    ) -> NewJob:
        """Return the job of a call. Raises `InvalidRequest`, `MessageTooDeep`, `MessageTooLarge` as the sender."""
        amqp: Any = self._app.amqp
        args, kwargs = args or (), kwargs or {}
        filled = {"argsrepr": amqp.shown("argsrepr", args), "kwargsrepr": amqp.shown("kwargsrepr", kwargs)}
        body = encode_body((args, kwargs, _NOTHING), {"task": first.name, **filled}, None, None)[0]
        check_body(body, first.name)
        check_job_id(job)
        filled |= {"origin": origin(os.getpid()), "reply_to": self._app.thread_oid}
        message = template.fill(job, body, self._stores.settings.max_message, **filled)
        filled_job: NewJob = amqp.job_sender.encoder.job_like(first, job, message, may_ask=may_ask)
        return filled_job

    def _learn(
        self, call: _Call, task: Any, producer: SpareProducer, args: Any, kwargs: Any, options: Mapping[str, Any]
    ) -> None:
        """Keep a template of the job that Celery published by `producer`, if the call is of an ordinary kind."""
        job, amqp = producer.job, call.amqp
        options = {**task._get_exec_options(), "ignore_result": task.ignore_result, **options, "task_id": None}
        routed = _routed(amqp, task.name)
        if job is None or producer.serializer not in (None, JSON) or not (_are_plain(options) and _are_plain(routed)):
            return
        name: Any = options.get("queue") or routed.get("queue") or self._app.conf.task_default_queue
        queue = _queue(amqp, name)
        if queue is None or queue.exchange.type != "direct" or queue.name != job.queue:
            return
        template = self._template_of(task, job, args, kwargs)
        if template is not None:
            first = replace(job, message=b"", constraints=None)
            learned, ignored = _learned(amqp, first), options["ignore_result"]
            self._kinds[call.key] = _Kind(call.state, first, template, ignored, routed, queue, name, learned)

    def _template_of(self, task: Any, job: NewJob, args: Any, kwargs: Any) -> Template | None:
        """Return a template of the message of a job, None where it would not do for other calls."""
        if not _is_plain_task(task) or decode(job.message)["headers"].keys() != _HEADERS:
            return None
        template = Template.of(job.message)
        # Safety check: keep the template only if it gives exactly Celery's job.
        return template if self._fill(job, template, job.id, args, kwargs, may_ask=False) == job else None

    def like(self, task: Any, job: NewJob, args: Any, kwargs: Any) -> Callable[[str, Any], NewJob] | None:
        """Return a function that makes a job like `job` from another id and other positional arguments.

        The caller ensures that nothing but these two differs, and asks `listens` before each call. Return None where
        such calls have no template, so that Celery makes each message.
        """
        try:
            if listens() or not _is_plain_app(self._app):
                return None
            template = self._template_of(maybe_evaluate(task), job, args, kwargs)
        except Exception:
            # The first job is accepted, and Celery makes the others too.
            logger.debug("no template of %s was made", job.name, exc_info=True)
            return None
        return None if template is None else lambda job_id, values: self._fill(job, template, job_id, values, kwargs)


def listens() -> bool:
    """Return True if somebody listens to Celery's signals around a publish."""
    return bool(
        signals.before_task_publish.receivers or signals.after_task_publish.receivers or signals.task_sent.receivers
    )


def _queue(amqp: Any, name: str) -> Any:
    """Return the queue that Celery finds, without making one."""
    queues = amqp.queues
    return queues.aliases.get(name) or queues.get(name)


def _routed(amqp: Any, name: str) -> Mapping[str, Any]:
    """Return the options that the routes behind the platform's give a task."""
    return next((options for route in amqp.router.routes[1:] if (options := route(name)) is not None), {})


def _learned(amqp: Any, job: NewJob) -> int:
    """Return the learned run time of a job's task."""
    return int(amqp.job_sender.encoder.learned_of(job.name, split_suffix(job.shape)[0]))


def _goes_there(kind: _Kind, amqp: Any) -> bool:
    """Return True if calls still go where those of the kind went."""
    return _queue(amqp, kind.queue_name) is kind.queue and _routed(amqp, kind.first.name) == kind.routed


def _are_plain(options: Mapping[str, Any]) -> bool:
    return all(value is None or (option in _OPTIONS and type(value) in _SIMPLE) for option, value in options.items())


def _is_plain_task(task: Any) -> bool:
    return (
        not task.name.startswith(_SPECIAL)
        and not (declares(task) or limited(task))
        and {type(task.cpus), type(task.memory), type(task.gpus), type(task.expected), type(task.tenant)} <= _AMOUNTS
        and task.resources is task.where is task.requests is None
        and task._dump_pydantic_arguments is None
        and type(task)._get_exec_options is Task._get_exec_options
        and not task.__v2_compat__
    )


def _is_plain_app(app: Celery) -> bool:
    """Return True if only Celery's and the platform's code makes and sends a message.

    Nothing may be around it or in between.
    """
    amqp: Any = app.amqp
    if type(amqp).__mro__[1:3] != (PlatformAMQP, celery_amqp.AMQP):
        return False
    routes = amqp.router.routes
    return (
        getattr(amqp.create_task_message, "__func__", None) is PlatformAMQP.as_task_v2
        and is_of(amqp.send_task_message, platform_amqp)
        and type(amqp.queues) is celery_amqp.Queues
        and type(amqp.router) is celery_routes.Router
        and [type(route) for route in routes] == [Router, *[celery_routes.MapRoute] * (len(routes) - 1)]
        and sends_plainly(app)
        and is_of(app.producer_or_acquire, celery_base)
        and is_of(celery_amqp.AMQP.as_task_v2, celery_amqp)
        and is_of(celery_amqp.AMQP._create_task_sender, celery_amqp)
        and is_of(celery_routes.Router.route, celery_routes)
        and is_of(_APPLY_ASYNC, celery_task)
        and is_of(_SHADOW_NAME, celery_task)
    )


def sends_plainly(app: Celery) -> bool:
    """Return True if `send_task` is Celery's with the platform's around it, and nothing else."""
    around, wrapped = app.send_task, getattr(app.send_task, "__wrapped__", None)
    return is_of(around, validation) and is_of(wrapped, celery_base) and is_of(type(app).send_task, celery_base)


def is_of(function: Any, module: Any) -> bool:
    """Return True if a function was written in a module.

    A wrapper, of wrapt say, may answer like its function to everything but `type`.
    """
    return type(function) in (FunctionType, MethodType) and function.__globals__ is vars(module)


def _is_method(bound: Any, function: Any) -> bool:
    return type(bound) is MethodType and bound.__func__ is function
