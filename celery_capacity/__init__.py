"""The public names of the platform.

    from celery_capacity import create_app

    app = create_app()
    app.send_task("demo.sleep", args=[1.0], cpus=4, memory="2GiB")

`create_app` makes a Celery app whose tasks are placed by capacity, `install` does it to an app that exists,
`Request` is what a job asks for, `fenced` commits a task's rows together with the end of its job, and `progress` says
how far a task has come. `job` is a handle of a job: a `Job`, whose `aio` is an `AsyncJob` for asyncio programs. Its
state is a `JobEvent`, all that is known of it a `JobInfo`, and the result of its cancel a `Cancellation`.
`cluster` is a handle of the cluster, a `Cluster`. The rest are the errors, all derived from `PlatformError`:

    PlatformError
    ├── Infeasible       the job failed, because no registered worker could hold it
    ├── InvalidRequest   also a ValueError; nothing was written
    │   ├── MessageTooLarge  more bytes than are allowed
    │   ├── MessageTooDeep   nested deeper than is allowed
    │   └── NotRetried       this job cannot be retried
    ├── LeaseLost        this attempt no longer holds its job
    ├── NameTaken        another live worker has this name
    ├── NoServers        no Redis and Postgres are named or running
    ├── NotAccepted      nothing was written; submit again
    │   └── BacklogFull      more jobs wait than are allowed
    ├── NotMigrated      the tables are missing or of another version
    ├── OutcomeUnknown   it may have been written; the error has the job's id
    ├── PartlyAccepted   of many jobs some were accepted, then one was not
    ├── SettingsError    every wrong setting at once
    ├── StoreUnavailable Redis or Postgres does not answer
    └── Unsupported      a feature of Celery that the platform does not carry out yet

Importing this package opens no connection, starts no thread and loads no Celery: the names are looked up when
they are used. Its parts `platform`, `workers`, `routing` and `migrations` are links to the folders beside it.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from celery_capacity.routing.errors import (
        BacklogFull,
        Infeasible,
        InvalidRequest,
        LeaseLost,
        MessageTooDeep,
        MessageTooLarge,
        NameTaken,
        NoServers,
        NotAccepted,
        NotMigrated,
        NotRetried,
        OutcomeUnknown,
        PartlyAccepted,
        PlatformError,
        SettingsError,
        StoreUnavailable,
        Unsupported,
    )
    from celery_capacity.routing.inspect.explanation import Explanation
    from celery_capacity.routing.inspect.job_events import JobEvent
    from celery_capacity.routing.model.request import Request
    from celery_capacity.workers.app.install import create_app, install
    from celery_capacity.workers.client.cancel import Cancellation
    from celery_capacity.workers.client.cluster import Cluster, cluster
    from celery_capacity.workers.client.fenced import fenced
    from celery_capacity.workers.client.job import AsyncJob, Job, job
    from celery_capacity.workers.client.job_info import JobInfo
    from celery_capacity.workers.process.progress import progress

__all__ = [
    "AsyncJob",
    "BacklogFull",
    "Cancellation",
    "Cluster",
    "Explanation",
    "Infeasible",
    "InvalidRequest",
    "Job",
    "JobEvent",
    "JobInfo",
    "LeaseLost",
    "MessageTooDeep",
    "MessageTooLarge",
    "NameTaken",
    "NoServers",
    "NotAccepted",
    "NotMigrated",
    "NotRetried",
    "OutcomeUnknown",
    "PartlyAccepted",
    "PlatformError",
    "Request",
    "SettingsError",
    "StoreUnavailable",
    "Unsupported",
    "cluster",
    "create_app",
    "fenced",
    "install",
    "job",
    "progress",
]

#: Where the names that are looked up when used come from; what is not here is an error and comes from
#: routing.errors.
_SOURCES = {
    "AsyncJob": "celery_capacity.workers.client.job",
    "Cancellation": "celery_capacity.workers.client.cancel",
    "Cluster": "celery_capacity.workers.client.cluster",
    "Explanation": "celery_capacity.routing.inspect.explanation",
    "Job": "celery_capacity.workers.client.job",
    "JobEvent": "celery_capacity.routing.inspect.job_events",
    "JobInfo": "celery_capacity.workers.client.job_info",
    "Request": "celery_capacity.routing.model.request",
    "cluster": "celery_capacity.workers.client.cluster",
    "create_app": "celery_capacity.workers.app.install",
    "fenced": "celery_capacity.workers.client.fenced",
    "install": "celery_capacity.workers.app.install",
    "job": "celery_capacity.workers.client.job",
    "progress": "celery_capacity.workers.process.progress",
}


def __getattr__(name: str) -> _Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(_SOURCES.get(name, "celery_capacity.routing.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
