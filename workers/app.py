"""Making a Celery app whose tasks are admitted by capacity: `create_app` a new one, `install` for one that exists."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Final, cast

from celery import Celery
from celery.app import backends
from kombu.utils.imports import symbol_by_name

from routing.errors import PlatformError
from workers import ticks
from workers.adoption import cover_tasks, make_anew, unproxied
from workers.amqp import amqp_class
from workers.call import checking
from workers.control import control_class
from workers.preflight import check_broker, check_imports
from workers.results import BACKENDS, backend_class
from workers.router import Router
from workers.stores import Resolve, Stores, resolve_running
from workers.task import cover, task_class

#: Seconds. kombu waits for ever on a dead connection by default.
BROKER_TRANSPORT: Final = {
    "socket_timeout": 5.0,
    "socket_connect_timeout": 3.0,
    "socket_keepalive": True,
    "health_check_interval": 10,
}


def create_app(
    name: str = "platform",
    include: Iterable[str] = (),
    *,
    resolve: Resolve = resolve_running,
    **celery_options: Any,
) -> Celery:
    """A Celery app on the platform's stores, made the current one. Opens nothing.

    `include`: modules with tasks. `resolve`: what to do when no URL is set (the default takes the running embedded
    servers, and raises `NoServers` without any). Other options are Celery's own, and win over the platform's.
    """
    app = Celery(name, include=[*include], set_as_current=True, **celery_options)
    return install(app, resolve=resolve)


def install(app: Celery, *, resolve: Resolve = resolve_running) -> Celery:
    """Give an existing app admission by capacity; the app is returned. A second time changes nothing.

    Call it when the app is made: before or after its tasks are defined, its configuration is read or something was
    sent. Its own AMQP, control, task, request and consumer classes are kept and extended, as are settings that it names
    itself. Where the app has read its configuration already, the environment is read at once (and `SettingsError` or
    `NoServers` raised), else when it does.
    """
    app = unproxied(app)
    if isinstance(getattr(app, "platform", None), Stores):
        return app
    stores = Stores(resolve)
    app.platform = stores
    app.amqp_cls = amqp_class(_as_class(app.amqp_cls), stores)
    app.control_cls = control_class(_as_class(app.control_cls), stores)
    app.task_cls = task_class(app.task_cls)
    app.loader.override_backends = {**BACKENDS, **app.loader.override_backends}
    _carry_results(app)
    _check_imports(app, stores)
    app.send_task = checking(app.send_task)
    app.add_defaults(partial(_defaults_of, app, stores))
    app.on_after_configure.connect(_configured, weak=False)
    app.on_after_finalize.connect(_finish, weak=False)
    make_anew(app)
    cover_tasks(app)
    if app.finalized:
        _finish(app)
    # Here, not at the import of this module: its signals concern the worker of an installed app only.
    from workers import steps

    steps.connect()
    return app


def platform_of(app: Celery) -> Stores:
    """The stores of an app: `settings`, `engine`, `redis`, `ledger`. Raises where the platform is not installed."""
    stores = getattr(app, "platform", None)
    if not isinstance(stores, Stores):
        raise PlatformError(
            f"the app {app.main!r} is not on the platform",
            advice="Use `celery -A platform`, or call celery_capacity.install(app) in its module.",
        )
    return stores


def _check_imports(app: Celery, stores: Stores) -> None:
    """Have whoever imports the tasks, a worker or beat, look first whether the modules of the settings are there."""
    plain = app.loader.import_default_modules

    def checked() -> Any:
        check_imports(stores.settings.imports)
        return plain()

    app.loader.import_default_modules = checked


def _carry_results(app: Celery) -> None:
    """Have the app make its result backend, whichever it is, with the platform's in front of it."""

    def make() -> Any:
        found, url = backends.by_url(app.backend_cls or app.conf.result_backend, app.loader)
        return backend_class(found)(app=app, url=url)

    app._get_backend = make


def _as_class(of: Any) -> type:
    return cast("type", symbol_by_name(of))


def _defaults_of(app: Celery, stores: Stores) -> dict[str, Any]:
    """Made once, so that `_configured` knows it again."""
    made: dict[str, Any] | None = app.__dict__.get("platform_defaults")
    if made is None:
        made = app.platform_defaults = _defaults(app, stores)
    return made


def _configured(sender: Celery, **_: Any) -> None:
    """A configuration that was read anew (`config_from_object` after a first use) has lost all defaults."""
    made = _defaults_of(sender, platform_of(sender))
    if not any(known is made for known in sender.conf.defaults):
        sender.conf.add_defaults(made)


def _defaults(app: Celery, stores: Stores) -> dict[str, Any]:
    """What the platform asks of Celery's configuration; the app's own settings win over it."""
    settings = stores.settings
    check_broker(settings.broker_url)
    return {
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
        "worker_consumer": "workers.consumer:Consumer",
        # An answer such as OOM, MISCONF or READONLY must not end the worker (celery#7946).
        "broker_channel_error_retry": True,
        "broker_connection_max_retries": None,
        "broker_connection_retry_on_startup": True,
        "broker_transport_options": dict(BROKER_TRANSPORT),
        "redis_socket_timeout": 5.0,
        "redis_socket_connect_timeout": 3.0,
        "redis_socket_keepalive": True,
        # Whoever reads a result while the backend restarts waits for it: nine tries, in the end some five seconds apart
        # (with Celery's base of 10 ms, doubled each time), about ten seconds in all.
        "result_backend_always_retry": True,
        "result_backend_max_retries": 9,
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "beat_schedule": ticks.beat_entries(settings),
    }


def _finish(sender: Celery, **_: Any) -> None:
    """Once the app is final: a schedule of the user's own does not lose the platform's ticks, and no task is left
    that was decorated before `install` and made since."""
    for task in sender._tasks.values():
        cover(task)
    stores = platform_of(sender)
    schedule = sender.conf.beat_schedule
    for name, entry in ticks.beat_entries(stores.settings).items():
        schedule.setdefault(name, entry)
