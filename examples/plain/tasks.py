"""A project of one module: `celery -A tasks worker`."""

from celery import Celery

from celery_capacity import install

app = install(Celery("tasks"))


@app.task(cpus=2, memory="64MiB")
def simulate(steps: int) -> int:
    """Simulate. This heavy task starts where two CPUs are free."""
    return sum(range(steps))


@app.task(cpus=0.5)
def report(values: list[int]) -> str:
    """Report the runs. This task is light."""
    return f"{len(values)} runs, {sum(values)} in all"


@app.task(bind=True, max_retries=1)
def flaky(self) -> int:  # type: ignore[no-untyped-def]
    """Fails once; says how often it was tried."""
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return self.request.retries + 1
