"""The platform's defaults for Celery's configuration. The app's own settings win over them."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from typing import Any, Final

from celery import Celery
from celery.app.utils import Settings
from celery.backends.base import DisabledBackend

from celery_capacity.routing.config import timeouts
from celery_capacity.routing.errors import NoServers
from celery_capacity.workers.broker import beat_messages
from celery_capacity.workers.membership.preflight import check_broker
from celery_capacity.workers.process.stores import Stores
from celery_capacity.workers.submit.router import Router

#: Seconds of silence until the kernel asks whether a connection still leads anywhere, seconds between its questions,
#: and the most questions that go unanswered: as for Postgres. By default the kernel asks after two hours.
KEEPALIVE: Final = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}

BROKER_TRANSPORT: Final = {
    "socket_keepalive": True,
    # A wait for messages is asked anew once a minute. The kernel finds a dead connection sooner, and asks no server.
    "socket_keepalive_options": {getattr(socket, name): n for name, n in KEEPALIVE.items() if hasattr(socket, name)},
    # Seconds between looks at silent connections: an idle worker asks little. A failure that the ledger's heartbeat
    # finds concerns these connections too, see `transport.doubt`.
    "health_check_interval": 60,
    # Pause between two looks for messages that were never acknowledged: for the intake in its own looks, one per 0.5 s,
    # and for a loop in seconds.
    "unacked_restore_throttle": 240,
    "unacked_restore_interval": 60,
}

#: A broker that nobody connects to.
EAGER: Final = "memory://"
#: The settings that name servers.
SERVERS: Final = ("broker_url", "result_backend")
_NOT_THERE: Final = object()
#: Attribute in which `QuickSettings` keeps the names of settings, and its content at first.
_KEYS: Final = "_platform_keys"
_NONE: Final[tuple[Any, Any, dict[str, tuple[str, ...]]]] = (_NOT_THERE, None, {})
_get: Final = dict.get


class QuickSettings(Settings):
    """Celery's settings, read without an exception for each mapping that lacks a name.

    Celery reads settings five times for each task that is sent.
    """

    def __getitem__(self, key: str) -> Any:
        prefix, key_maps, keys_by_name = self.__dict__.get(_KEYS, _NONE)
        if prefix is not self.prefix or key_maps is not self._keys:
            keys_by_name = {}
            # An attribute that is set in the plain way would be a setting.
            self.__dict__[_KEYS] = (self.prefix, self._keys, keys_by_name)
        # The names under which a setting may stand. They depend on its own name, the prefix and `_keys` alone.
        keys = keys_by_name.get(key)
        if keys is None:
            keys = keys_by_name[key] = tuple(self._to_keys(key))
        for mapping in self.maps:
            if type(mapping) in _PLAIN:
                for name in keys:
                    value = _get(mapping, name, _NOT_THERE)
                    if value is not _NOT_THERE:
                        return mapping[name] if value is None else value
                continue
            # A mapping of the user's own may make a value when it is asked for it, which its `get` need not do.
            for name in keys:
                try:
                    return mapping[name]
                except KeyError:
                    continue
        return super().__getitem__(key)


class Defaults(dict[str, Any]):
    """Celery's settings by name. The addresses of servers are looked up only when somebody needs them.

    Tests that call tasks in their own process (`task_always_eager`, `apply`) and commands that only look at the code
    need no servers.
    """

    def __init__(self, app: Celery, stores: Stores) -> None:
        self._app = app
        self._stores = stores
        settings = stores.settings_without_servers()
        if settings.broker_url is not None:
            check_broker(settings.broker_url)
        answer_timeout, connect_timeout = (
            share * settings.store_timeout for share in (timeouts.ANSWER, timeouts.CONNECT)
        )
        super().__init__(
            {
                "broker_url": settings.broker_url,
                "result_backend": settings.result_backend,
                "imports": settings.imports,
                "task_routes": [Router(stores, lambda: app.tasks)],
                "task_default_queue": "celery",
                # Rows own the retries: the broker's message is acknowledged early, or not at all.
                "task_acks_late": False,
                "task_reject_on_worker_lost": False,
                # Every message in a worker's queue was admitted to that worker.
                "worker_prefetch_multiplier": 0,
                "worker_disable_rate_limits": True,
                "worker_consumer": "celery_capacity.workers.execute.consumer:Consumer",
                # An answer such as OOM, MISCONF or READONLY must not end the worker (celery#7946).
                "broker_channel_error_retry": True,
                "broker_connection_max_retries": None,
                "broker_connection_retry_on_startup": True,
                # By default kombu waits for ever on a dead connection.
                "broker_transport_options": {
                    "socket_timeout": answer_timeout,
                    "socket_connect_timeout": connect_timeout,
                    **BROKER_TRANSPORT,
                },
                "redis_socket_timeout": answer_timeout,
                "redis_socket_connect_timeout": connect_timeout,
                "redis_socket_keepalive": True,
                # A client that reads a result while the backend restarts waits for it: nine tries, about ten seconds in
                # all. Celery's base of 10 ms doubles each time, so the last tries are some five seconds apart.
                "result_backend_always_retry": True,
                "result_backend_max_retries": 9,
                "task_serializer": "json",
                "result_serializer": "json",
                "accept_content": ["json"],
                "result_accept_content": ["json"],
                # Without a schedule here, `add_periodic_task` would write into Celery's, which all apps share.
                "beat_schedule": beat_messages.beat_entries(settings),
            }
        )

    def put_last(self, conf: Any) -> None:
        """Put these defaults into an app's configuration, in front of nothing but Celery's own defaults.

        So the app's configuration module, or Django's settings, wins. `app.add_defaults` would put them in front of
        these.
        """
        if any(mapping is self for mapping in conf.maps):
            return
        conf.maps.insert(-1, self)
        conf.defaults.insert(-1, self)
        if type(conf) is Settings:
            # An attribute that is set in the plain way would be a setting.
            object.__setattr__(conf, "__class__", QuickSettings)
        testing = sys.modules.get("celery.contrib.testing.app")
        if testing is not None:
            _drop_servers_of_tests(conf, testing.DEFAULT_TEST_CONFIG)

    def __getitem__(self, name: str) -> Any:
        """Return a setting. Raises `NoServers` for an address where no servers are named or running."""
        return self._found(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting like `[name]`, but the default where there is no such name."""
        return self._found(name, super().get(name, default))

    def _found(self, name: str, found: Any) -> Any:
        if found is None and name in SERVERS:
            try:
                return getattr(self._stores.settings, name)
            except NoServers:
                if name == "broker_url" and self._app.conf.task_always_eager:
                    # Celery asks for a producer to look at the arguments, and publishes nothing.
                    return EAGER
                raise
        return found


def _drop_servers_of_tests(conf: Any, theirs: Mapping[str, Any]) -> None:
    """Drop the broker and the results in memory that Celery's test apps have among their defaults.

    An app of `celery.contrib.pytest` for which nobody chose servers has them.
    """
    for mapping in conf.defaults:
        for name in SERVERS:
            if type(mapping) is dict and mapping.get(name) == theirs[name]:
                del mapping[name]


#: Types of mappings that hold their values.
_PLAIN: Final = frozenset({dict, Defaults})


class NoBackend(DisabledBackend):
    """Result backend where no servers are named or running.

    A task that is called in this process needs no servers. A client that asks for the result of a job hears what is
    missing.
    """

    def __init__(self, app: Celery, missing: NoServers) -> None:
        super().__init__(app=app)
        self._missing = missing

    def _is_disabled(self, *args: Any, **options: Any) -> Any:
        # Servers may be there the next time.
        self.app._backend_cache = self.app._local.backend = None
        raise self._missing

    ensure_chords_allowed = get_state = get_status = get_result = get_traceback = _is_disabled
    get_task_meta_for = wait_for = get_many = _is_disabled
