"""Make a Celery app whose tasks are admitted by capacity: a new app by `create_app`, an existing one by `install`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

from celery import Celery
from celery.app import backends
from kombu.utils.imports import symbol_by_name

from celery_capacity.routing.errors import NoServers
from celery_capacity.workers.app import flower
from celery_capacity.workers.app.control import control_class
from celery_capacity.workers.app.defaults import Defaults, NoBackend
from celery_capacity.workers.app.existing_parts import cover_tasks, make_anew, unproxied
from celery_capacity.workers.broker import beat_messages
from celery_capacity.workers.client.group_result import PlatformGroupResult
from celery_capacity.workers.logs import log_format
from celery_capacity.workers.membership.preflight import check_imports
from celery_capacity.workers.process.stores import Resolve, Stores, platform_of, resolve_running, stores_of
from celery_capacity.workers.results.backends import BACKENDS, backend_class
from celery_capacity.workers.results.cancellation import purge_queue
from celery_capacity.workers.results.events import teach_states
from celery_capacity.workers.submit import groups, submit_many
from celery_capacity.workers.submit.amqp import amqp_class
from celery_capacity.workers.submit.message_cache import MessageCache
from celery_capacity.workers.submit.task import cover, task_class
from celery_capacity.workers.submit.validation import checking


def create_app(
    name: str = "platform",
    include: Iterable[str] = (),
    *,
    resolve: Resolve = resolve_running,
    **celery_options: Any,
) -> Celery:
    """Return a new Celery app on the platform's stores, and make it the current app. Opens nothing.

    `include`: modules with tasks. `resolve`: called when no URL is set. Its default takes the running embedded servers,
    and raises `NoServers` without any. Other options are Celery's own, and win over the platform's.
    """
    app = Celery(name, include=[*include], set_as_current=True, **celery_options)
    return install(app, resolve=resolve)


def install(app: Celery, *, resolve: Resolve = resolve_running) -> Celery:
    """Give an existing app admission by capacity, and return the app. A second call changes nothing.

    Call it when the app is made: before or after its tasks are defined, its configuration is read or something was
    sent. The app's own AMQP, control, task, request and consumer classes are kept and extended, as are settings that
    the app names itself. Where the app has read its configuration already, the environment is read at once, which may
    raise `SettingsError`. Otherwise the environment is read when the app reads its configuration. Servers are looked
    for when one is needed.
    """
    app = unproxied(app)
    if stores_of(app) is not None:
        return app
    stores = Stores(resolve)
    app.platform = stores
    app.amqp_cls = amqp_class(_as_class(app.amqp_cls), stores, purge_queue)
    app.control_cls = control_class(_as_class(app.control_cls), stores)
    app.task_cls = task_class(app.task_cls)
    app.loader.override_backends = {**BACKENDS, **app.loader.override_backends}
    _carry_results(app)
    _check_imports(app, stores)
    app.send_task = checking(app)
    app.platform_templates = MessageCache(app, stores)
    app.GroupResult = app.subclass_with_self(PlatformGroupResult, name="GroupResult", reverse="GroupResult")
    app.submit_many = partial(submit_many.submit_many, app)
    groups.connect()
    teach_states()
    flower.prepare(stores)
    log_format.add_options(app)
    # Called each time that a configuration is read: `config_from_object` after a first use reads it anew.
    app.add_defaults(partial(_configured, app))
    app.on_after_configure.connect(_configured, weak=False)
    app.on_after_finalize.connect(_finish, weak=False)
    make_anew(app)
    cover_tasks(app)
    if app.finalized:
        _finish(app)
    # Imported here, not with this module: its signals concern the worker of an installed app only.
    from celery_capacity.workers.app import signals

    signals.connect()
    return app


def _check_imports(app: Celery, stores: Stores) -> None:
    """Have a worker or beat check that the modules of the settings are there, before it imports the tasks."""
    plain = app.loader.import_default_modules

    def checked() -> Any:
        check_imports(stores.settings_without_servers().imports)
        return plain()

    app.loader.import_default_modules = checked


def _carry_results(app: Celery) -> None:
    """Have the app make its result backend, whichever it is, with the platform's class in front of it."""

    def make() -> Any:
        try:
            base, url = backends.by_url(app.backend_cls or app.conf.result_backend, app.loader)
        except NoServers as missing:
            return NoBackend(app, missing)
        return backend_class(base)(app=app, url=url)

    app._get_backend = make


def _as_class(of: Any) -> type:
    return cast("type", symbol_by_name(of))


def _configured(sender: Celery, **_: Any) -> dict[str, Any]:
    """Add the platform's defaults to a configuration that was read. Returns no settings that are to stand before it."""
    made: Defaults | None = sender.__dict__.get("platform_defaults")
    if made is None:
        made = sender.platform_defaults = Defaults(sender, platform_of(sender))
    made.put_last(sender.conf)
    if sender.finalized:
        _add_ticks(sender)
    return {}


def _finish(sender: Celery, **_: Any) -> None:
    """Cover the last tasks once the app is final: tasks that were decorated before `install` and made since."""
    for task in sender._tasks.values():
        cover(task)
    _add_ticks(sender)


def _add_ticks(app: Celery) -> None:
    """Add the platform's ticks to a schedule of the user's own, which would lack them."""
    entries = beat_messages.beat_entries(platform_of(app).settings_without_servers())
    if entries.keys() - app.conf.beat_schedule.keys():
        app.conf.beat_schedule = {**entries, **app.conf.beat_schedule}
