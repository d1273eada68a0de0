"""Send a chord: four simulations, and a report of them. `python submit.py`."""

from celery import chord
from tasks import report, simulate

if __name__ == "__main__":
    result = chord([simulate.s(steps) for steps in (10, 20, 30)] + [simulate.s(40).set(cpus=1)], report.s()).delay()
    print(result.get(timeout=60))
