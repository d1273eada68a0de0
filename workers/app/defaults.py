"""What the platform asks of Celery's configuration. The app's own settings win over it."""

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
#: and how many go unanswered at the most: as for Postgres. (By default it asks after two hours.)
KEEPALIVE: Final = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}

BROKER_TRANSPORT: Final = {
    "socket_keepalive": True,
    # A wait for messages is asked anew once a minute: the kernel finds out sooner, and asks nobody's server.
    "socket_keepalive_options": {getattr(socket, name): n for name, n in KEEPALIVE.items() if hasattr(socket, name)},
    # Between looks at connections that say nothing: an idle worker asks little. (What the ledger's heartbeat finds out
    # concerns these connections too, see `transport.doubt`.)
    "health_check_interval": 60,
    # Looks of the intake, at its 0.5 s, between two for messages that were never acknowledged; of a loop, seconds.
    "unacked_restore_throttle": 240,
    "unacked_restore_interval": 60,
}

#: A broker that nobody connects to.
EAGER: Final = "memory://"
#: The settings that name servers.
SERVERS: Final = ("broker_url", "result_backend")
_NOT_THERE: Final = object()
#: Where `QuickSettings` keeps the names of settings, and what it finds there at first.
_KEYS: Final = "_platform_keys"
_NONE: Final[tuple[Any, Any, dict[str, tuple[str, ...]]]] = (_NOT_THERE, None, {})
_get: Final = dict.get


class QuickSettings(Settings):
    """Celery's settings, which are read five times for each task that is sent: without an exception for each mapping
    that a name is not in."""

    def __getitem__(self, key: str) -> Any:
        prefix, own, known = self.__dict__.get(_KEYS, _NONE)
        if prefix is not self.prefix or own is not self._keys:
            known = {}
            # (To set an attribute would be a setting.)
            self.__dict__[_KEYS] = (self.prefix, self._keys, known)
        # The names under which it may stand, which are made of its own and of these two alone.
        keys = known.get(key)
        if keys is None:
            keys = known[key] = tuple(self._to_keys(key))
        for mapping in self.maps:
            if type(mapping) in _PLAIN:
                for name in keys:
                    found = _get(mapping, name, _NOT_THERE)
                    if found is not _NOT_THERE:
                        return mapping[name] if found is None else found
                continue
            # One of the user's own may make a value when it is asked for it, which its `get` need not do.
            for name in keys:
                try:
                    return mapping[name]
                except KeyError:
                    continue
        return super().__getitem__(key)


class Defaults(dict[str, Any]):
    """Celery's settings by name. The addresses of servers are looked up when somebody needs them: tests that call tasks
    in their own process (`task_always_eager`, `apply`) and commands that only look at the code need none."""

    def __init__(self, app: Celery, stores: Stores) -> None:
        self._app = app
        self._stores = stores
        settings = stores.settings_without_servers()
        if settings.broker_url is not None:
            check_broker(settings.broker_url)
        answer_within, connect_within = (part * settings.store_timeout for part in (timeouts.ANSWER, timeouts.CONNECT))
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
                # All that is in a worker's queue was admitted to it.
                "worker_prefetch_multiplier": 0,
                "worker_disable_rate_limits": True,
                "worker_consumer": "celery_capacity.workers.execute.consumer:Consumer",
                # An answer such as OOM, MISCONF or READONLY must not end the worker (celery#7946).
                "broker_channel_error_retry": True,
                "broker_connection_max_retries": None,
                "broker_connection_retry_on_startup": True,
                # (kombu waits for ever on a dead connection by default.)
                "broker_transport_options": {
                    "socket_timeout": answer_within,
                    "socket_connect_timeout": connect_within,
                    **BROKER_TRANSPORT,
                },
                "redis_socket_timeout": answer_within,
                "redis_socket_connect_timeout": connect_within,
                "redis_socket_keepalive": True,
                # Whoever reads a result while the backend restarts waits for it: nine tries, in the end some five
                # seconds apart (with Celery's base of 10 ms, doubled each time), about ten seconds in all.
                "result_backend_always_retry": True,
                "result_backend_max_retries": 9,
                "task_serializer": "json",
                "result_serializer": "json",
                "accept_content": ["json"],
                "result_accept_content": ["json"],
                # (Without one, `add_periodic_task` would write into Celery's, which all apps share.)
                "beat_schedule": beat_messages.beat_entries(settings),
            }
        )

    def put_last(self, conf: Any) -> None:
        """Into an app's configuration, before Celery's own defaults alone: what the app's configuration module says, or
        Django's settings, wins. (`app.add_defaults` would put it in front of these.)"""
        if any(known is self for known in conf.maps):
            return
        conf.maps.insert(-1, self)
        conf.defaults.insert(-1, self)
        if type(conf) is Settings:
            # (To set an attribute of it would be a setting.)
            object.__setattr__(conf, "__class__", QuickSettings)
        testing = sys.modules.get("celery.contrib.testing.app")
        if testing is not None:
            _drop_servers_of_tests(conf, testing.DEFAULT_TEST_CONFIG)

    def __getitem__(self, name: str) -> Any:
        """Raises `NoServers` for an address where none are named or running."""
        return self._found(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        """As `[name]`, the default where there is no such name."""
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
    """An app of `celery.contrib.pytest` for which nobody chose servers has, among its defaults, a broker and results in
    its own memory."""
    for mapping in conf.defaults:
        for name in SERVERS:
            if type(mapping) is dict and mapping.get(name) == theirs[name]:
                del mapping[name]


#: Mappings that hold their values.
_PLAIN: Final = frozenset({dict, Defaults})


class NoBackend(DisabledBackend):
    """Results where no servers are named or running: a task that is called in this process needs none, and whoever
    asks for the result of a job hears what is missing."""

    def __init__(self, app: Celery, missing: NoServers) -> None:
        super().__init__(app=app)
        self._missing = missing

    def _is_disabled(self, *args: Any, **options: Any) -> Any:
        # They may be there the next time.
        self.app._backend_cache = self.app._local.backend = None
        raise self._missing

    ensure_chords_allowed = get_state = get_status = get_result = get_traceback = _is_disabled
    get_task_meta_for = wait_for = get_many = _is_disabled
