"""The Celery app and its task. Workers: `celery -A jobs worker`."""

from celery_capacity import create_app

app = create_app("jobs")


@app.task(cpus=2, memory="64MiB")
def count_primes(below: int) -> int:
    """Count the primes below a number. The task is heavy, and asks for two CPUs."""
    sieve = bytearray([1]) * below
    for number in range(2, int(below**0.5) + 1):
        sieve[number * number :: number] = bytes(len(sieve[number * number :: number]))
    return sum(sieve[2:])
