"""Celery's start-up and shutdown signals, wired to the worker's runtime. No rule stands in here."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import warnings
from collections.abc import Mapping
from functools import partial
from types import FrameType
from typing import Any, Final
from weakref import WeakSet, WeakValueDictionary

from celery import signals
from celery.app import trace
from celery.exceptions import WorkerTerminate
from celery.platforms import EX_OK, SecurityWarning
from celery.utils.nodenames import anon_nodename
from kombu.asynchronous import set_event_loop
from kombu.utils.imports import symbol_by_name

from celery_capacity.routing.config.machine import Machine, check_reserved, default_concurrency, detect
from celery_capacity.routing.config.redaction import HIDDEN
from celery_capacity.workers.app import remote_control  # noqa: F401  its commands take the places of Celery's
from celery_capacity.workers.execute import readiness
from celery_capacity.workers.execute.gevent_pool import check_pool, prepare
from celery_capacity.workers.execute.pool import abandoned, end_process
from celery_capacity.workers.execute.readiness import refusing
from celery_capacity.workers.execute.runtime import Runtime, runtime_of
from celery_capacity.workers.logs import json_lines, kept_lines
from celery_capacity.workers.membership import orphans
from celery_capacity.workers.membership.preflight import check_broker, check_imports, check_results
from celery_capacity.workers.process.fork_safety import guard_children
from celery_capacity.workers.process.identity import Identity, name_of, nodename_of
from celery_capacity.workers.process.stores import stores_of
from celery_capacity.workers.results import running_workers
from celery_capacity.workers.supervision import job_times
from celery_capacity.workers.supervision.metrics_server import WorkerMetrics
from celery_capacity.workers.traces import worker as traces

#: Given by name, as Celery finds it: a process that only submits never loads it.
CONSUMER: Final = "celery_capacity.workers.execute.consumer:consumer_class"

#: Variable by which `up` tells its workers that it has said for all of them that they run as root.
ROOT_IS_KNOWN: Final = "CELERY_CAPACITY_ROOT_IS_KNOWN"

#: Numbers for the workers of this process that nobody named, beside the first.
_numbers: Final = itertools.count(2)
#: Workers of this process that have Celery's name for a worker in a thread, by that name.
_unnamed: Final = WeakValueDictionary[str, Runtime]()

#: Workers of this process.
_workers: Final[WeakSet[Any]] = WeakSet()

logger = logging.getLogger(__name__)


def connect() -> None:
    """Connect the signals, once for the process."""
    for event, handler in (
        (signals.celeryd_init, on_celeryd_init),
        (signals.worker_init, on_worker_init),
        (signals.worker_ready, on_worker_ready),
        (signals.worker_shutting_down, on_worker_shutting_down),
        (signals.worker_shutdown, on_worker_shutdown),
        (signals.beat_init, on_beat_init),
        (signals.worker_process_shutdown, kept_lines.on_worker_process_shutdown),
        (signals.worker_process_shutdown, traces.flush_traces),
        (signals.after_setup_logger, json_lines.on_after_setup_logger),
        (signals.after_setup_task_logger, json_lines.on_after_setup_logger),
    ):
        event.connect(handler, weak=False, dispatch_uid=f"celery-capacity.{handler.__name__}")
    logging.getLogger("celery.pool").addFilter(_without_arguments)


def _without_arguments(record: logging.LogRecord) -> bool:
    """Hide the arguments of jobs, which Celery's pool writes into its log at the level DEBUG."""
    if isinstance(record.args, tuple) and record.msg.startswith("TaskPool: Apply"):
        record.args = (record.args[0], HIDDEN, HIDDEN)
    return True


def on_celeryd_init(instance: Any = None, conf: Any = None, options: Any = None, **_: Any) -> None:
    """Name the worker, and size its pool by its CPUs, before anything is made of either."""
    stores = stores_of(instance.app)
    if stores is None:
        return
    json_lines.set_up_early()
    if os.geteuid() == 0:
        _warn_of_root()
    with refusing():
        settings = stores.settings
        check_imports((options or {}).get("include") or (), "--include")
        for warning in settings.warnings:
            logger.warning(warning)
        check_reserved(settings, Machine().read())
        instance.hostname = nodename_of(settings, instance.hostname)
        json_lines.JsonFormatter.worker = name_of(settings, instance.hostname)
        trace.setup_worker_optimizations(instance.app, instance.hostname)
        if not (options or {}).get("concurrency") and not conf.worker_concurrency:
            conf.worker_concurrency = default_concurrency(detect(settings).capacity.get("cpus"))


def _warn_of_root() -> None:
    """Say in one line that the worker runs as root. Celery says it in eight, of each worker.

    Celery still refuses to run as root where messages may be pickles.
    """
    warnings.filterwarnings("ignore", category=SecurityWarning, message="You're running the worker with superuser")
    if not os.environ.get(ROOT_IS_KNOWN):
        logger.warning("this worker runs as root, and so do its tasks: an ordinary user is safer")


def on_worker_init(sender: Any = None, **_: Any) -> None:
    """Refuse early a start that cannot work: no tables, a name that is taken."""
    stores = stores_of(sender.app)
    if stores is None:
        return
    with refusing():
        green = check_pool(sender.pool_cls)
        if green:
            prepare(sender.app, _drain)
        sender.consumer_cls = symbol_by_name(CONSUMER)(sender.consumer_cls)
        if rules := stores.requests:
            logger.info("%s names requests for %d patterns of task names", stores.settings.requests, len(rules.rules))
        unnamed = sender.hostname == anon_nodename() and not stores.settings.node_name
        if unnamed and _is_taken(sender.hostname):
            sender.hostname = anon_nodename(prefix=f"gen{next(_numbers)}-")
        identity = Identity(name_of(stores.settings, sender.hostname))
        orphans.mark(identity.incarnation)
        guard_children(stores.settings)
        check_broker(sender.app.conf.broker_read_url)
        check_results(sender.app)
        runtime = Runtime(sender.app, stores, identity, green)
        if type(sender) is not sender.app.WorkController:
            # A plain `WorkController` is only made to be looked at, by `celery graph bootsteps`: it meets the others
            # when it starts.
            runtime.joining.meet(threading.Event().wait)
        if running_workers.running():
            # Celery would have both workers wait with one event loop, in two threads.
            set_event_loop(None)
        if unnamed:
            _unnamed.setdefault(sender.hostname, runtime)
        sender.platform_runtime = runtime
        kept_lines.begin(stores, identity.incarnation)
        if stores.settings.traces:
            of_worker = traces.WorkerTraces(identity.name, runtime.holdings, runtime.ledger.now_ms)
            traces.begin(identity.incarnation, of_worker)
        sender.start = partial(_run, sender, runtime, sender.start)
        _workers.add(sender)


def _run(worker: Any, runtime: Runtime, start: Any) -> None:
    metrics = _metrics_of(runtime)
    try:
        runtime.run(start)
    finally:
        if metrics is not None:
            metrics.stop()
        job_times.end(runtime.identity.incarnation)
        kept_lines.end(runtime.identity.incarnation)
        traces.end(runtime.identity.incarnation)
        # A worker in a thread of a test process ends without its process.
        if abandoned(worker.pool) and threading.current_thread() is threading.main_thread():
            end_process(worker, EX_OK)


def _metrics_of(runtime: Runtime) -> WorkerMetrics | None:
    """Return the metrics of a worker, which are served already; None where no address is set for them."""
    address = runtime.stores.settings.worker_metrics
    if address is None:
        return None

    def resources() -> tuple[Mapping[str, int], Mapping[str, int]]:
        book = runtime.holdings.book()
        return book.capacity, book.allocated

    decides, heartbeat = runtime.confirmation, runtime.heartbeat
    times = job_times.JobTimes(runtime.holdings.find)
    metrics = WorkerMetrics(
        runtime.identity.name,
        resources,
        lambda: heartbeat.reached_at,
        lambda: (decides.authority, decides.epoch),
        times,
    )
    if metrics.start(address) is not None:
        job_times.begin(runtime.identity.incarnation, times)
    return metrics


def _is_taken(nodename: str) -> bool:
    """Return True if another worker of this process has a name, or will have it when it starts.

    Celery gives all workers that `celery.contrib.testing` runs in threads of a process one name.
    """
    other = _unnamed.get(nodename)
    if other is None or (other.joining.begun and other not in running_workers.running()):
        _unnamed.pop(nodename, None)
        return False
    return True


def on_worker_ready(sender: Any = None, **_: Any) -> None:
    """Join the platform: the pool is up and the queue is consumed, so jobs can be admitted to the worker."""
    readiness.join(sender)


def on_worker_shutting_down(sender: Any = None, how: str = "", **_: Any) -> None:
    """Drain the workers, and note a cold stop. In a signal handler: only flags are set and pipes written.

    Leaves the main thread's present work where bodies are left that nothing can break off.
    """
    for runtime in running_workers.running():
        runtime.stops(cold=how.lower() == "cold")
    _drain()
    if any(abandoned(worker.pool) and not worker.platform_runtime.leaving for worker in _workers):
        # The main thread may wait for the pool, or be in a body. It hands jobs back when it leaves, undisturbed.
        raise WorkerTerminate(EX_OK)


def _drain() -> None:
    """Drain the workers of this process, in a signal handler."""
    for runtime in running_workers.running():
        runtime.drain()


def on_worker_shutdown(sender: Any = None, **_: Any) -> None:
    """Settle and deregister after the pool has ended, before anybody else hears of it."""
    runtime = runtime_of(sender)
    if runtime is not None:
        runtime.leave()


def on_beat_init(sender: Any = None, **_: Any) -> None:
    """Have TERM and INT end beat wherever they interrupt it.

    Celery's handler closes the schedule and raises `SystemExit`. Python drops an exception that is raised inside a
    `__del__`, such as that of the result of a submitted task. Beat would go on with a closed schedule, and end with
    code 1. The platform's handler first tells beat to stop, so that its loop ends.
    """
    if stores_of(sender.app) is None or threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        celery_handler = signal.getsignal(number)
        if callable(celery_handler) and celery_handler is not signal.default_int_handler:
            signal.signal(number, partial(_stop_beat, sender, celery_handler))


def _stop_beat(service: Any, celery_handler: Any, number: int, frame: FrameType | None) -> None:
    service.stop()
    celery_handler(number, frame)
