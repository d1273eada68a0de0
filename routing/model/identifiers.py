"""Names that become part of a Redis key, a queue or a file: checked here, before they are used anywhere.

Each function returns the name unchanged, or raises `InvalidRequest` with the wrong value and the rule for a right one.
"""

from __future__ import annotations

import re

from celery_capacity.routing.errors import InvalidRequest, show

#: characters of a worker's name
MAX_WORKER_NAME = 100
#: characters of a resource's name
MAX_RESOURCE_NAME = 64
#: characters of a job's id
MAX_JOB_ID = 255
#: characters of a tenant's name
MAX_TENANT_NAME = 64
#: characters of a queue's name
MAX_QUEUE_NAME = 100

# Used with fullmatch only: "$" would let a newline at the end pass.
_WORKER_NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_WORKER_NAME}}}")
_TENANT_NAME = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_TENANT_NAME}}}")
_RESOURCE_NAME = re.compile(rf"[a-z0-9_.-]{{1,{MAX_RESOURCE_NAME}}}")


def check_worker_name(name: object, what: str = "worker name") -> str:
    """Check a worker's name: 1 to 100 letters, digits, ``_``, ``.``, ``-``; no ``:``, which divides keys into parts."""
    if isinstance(name, str) and _WORKER_NAME.fullmatch(name):
        return name
    raise InvalidRequest(
        f"{what} {show(name)} is not valid",
        value=name,
        advice=f"It must be 1 to {MAX_WORKER_NAME} characters of A-Z a-z 0-9 _ . - such as 'gpu-node-07'.",
    )


def check_resource_name(name: object, what: str = "resource name") -> str:
    """Check a resource's name: 1 to 64 of small letters, digits, ``_``, ``.`` and ``-``."""
    if isinstance(name, str) and _RESOURCE_NAME.fullmatch(name):
        return name
    raise InvalidRequest(
        f"{what} {show(name)} is not valid",
        value=name,
        advice=f"It must be 1 to {MAX_RESOURCE_NAME} characters of a-z 0-9 _ . - such as 'licence'.",
    )


def check_tenant(name: object, what: str = "tenant") -> str:
    """Check a tenant's name: 1 to 64 letters, digits, ``.``, ``_`` and ``-``."""
    if isinstance(name, str) and _TENANT_NAME.fullmatch(name):
        return name
    raise InvalidRequest(
        f"{what} {show(name)} is not valid",
        value=name,
        advice=f"It must be 1 to {MAX_TENANT_NAME} characters of A-Z a-z 0-9 . _ - such as 'physics'.",
    )


def check_queue_name(name: object) -> str:
    """Check a queue's name: 1 to 100 printable characters without white space, ``=`` and ``,``.

    In a shape, ``=`` and ``,`` separate the amounts.
    """
    # See check_job_id about isprintable.
    if isinstance(name, str) and name.isprintable() and 1 <= len(name) <= MAX_QUEUE_NAME and not set(name) & set(" =,"):
        return name
    raise InvalidRequest(
        f"queue {show(name)} is not valid",
        value=name,
        advice=f"Its name must be 1 to {MAX_QUEUE_NAME} printable characters without white space, = and , such as"
        " 'video'.",
    )


def check_job_id(job_id: object) -> str:
    """Check a job's id (Celery's task id): 1 to 255 printable characters without any white space."""
    # isprintable is false for controls, lone surrogates and every white space except the plain blank.
    if isinstance(job_id, str) and job_id.isprintable() and " " not in job_id and 1 <= len(job_id) <= MAX_JOB_ID:
        return job_id
    raise InvalidRequest(
        f"task_id {show(job_id)} is not valid",
        value=job_id,
        advice=f"It must be 1 to {MAX_JOB_ID} printable characters without white space, such as a UUID.",
    )
