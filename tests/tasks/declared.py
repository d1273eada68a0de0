"""Tasks that declare their needs, in each possible way."""

from __future__ import annotations

from typing import Any

from celery import shared_task


@shared_task
def nothing() -> None:
    """Declare nothing, which means the default."""


@shared_task(cpus=4)
def four() -> None:
    """Declare four CPUs."""


@shared_task(cpus=4, memory="2GiB")
def four_and_two() -> None:
    """Declare four CPUs, and memory as people write it."""


@shared_task(cpus=0.125, memory=1_000_000)
def an_eighth() -> None:
    """Declare a part of a CPU, and memory in bytes."""


@shared_task(cpus=0)
def none_at_all() -> None:
    """Declare no CPU: a slot alone."""


@shared_task(gpus=1, resources={"licence": 2})
def counted() -> None:
    """Declare counted resources."""


@shared_task(expected="10m")
def ten_minutes() -> None:
    """Declare the expected run time."""


@shared_task(expected="30m", time_limit=3600)
def half_an_hour() -> None:
    """Declare the expected run time, and Celery's hard limit."""


@shared_task(time_limit=3600)
def an_hour_at_most() -> None:
    """Declare Celery's hard limit alone."""


@shared_task(
    cpus=1,
    requests=[{"gpus": 1}, {"cpus": 2}],
    where={"arch": "aarch64"},
    tenant="physics",
    expected="10m",
    time_limit=3600,
    rerun=False,
)
def placed() -> None:
    """Declare alternatives, a place, a tenant, a run time and a limit."""


@shared_task(exclusive=True)
def alone() -> None:
    """Declare a worker of its own."""


@shared_task
def echo(value: Any) -> Any:
    """Return the argument."""
    return value


@shared_task(cpus=3, bind=True)
def three_again(self: Any) -> None:
    """Retry once."""
    if self.request.retries < 1:
        raise self.retry(countdown=0)
