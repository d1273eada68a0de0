"""Django: the project of examples/django, with a worker, beat in it, and Django's own commands."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import text

from tests.fixtures.documents.examples import move_into, python
from tests.fixtures.processes.platforms import READY, Platform
from tests.fixtures.waiting import until

#: Program that orders by HTTP: one order is taken, and the transaction of another is rolled back. It prints the orders
#: once the first has its total.
ORDERS = """
import json, os, sys, time
import django
os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"
django.setup()
from django.test import Client
from shop.orders.models import Order
client = Client()
taken = client.post("/orders/", {"items": 6})
refused = client.post("/orders/", {"items": 101})
number = taken.json()["number"]
end = time.monotonic() + 30
while client.get(f"/orders/{number}/").json()["total"] is None and time.monotonic() < end:
    time.sleep(0.02)
order = client.get(f"/orders/{number}/").json()
print(json.dumps([taken.status_code, refused.status_code, Order.objects.count(), order]))
"""

#: Program that prints the project's task classes, in Django's shell.
CLASSES = """
import json
from shop import celery_app
from celery.contrib.django.task import DjangoTask
from shop.orders.tasks import ship_paid
print(json.dumps({
    "tasks": sorted(name for name in celery_app.tasks if name.startswith("shop")),
    "django": isinstance(ship_paid, DjangoTask),
    "track": celery_app.conf.task_track_started,
    "consumer": celery_app.conf.worker_consumer,
    "beat": sorted(celery_app.conf.beat_schedule),
}))
"""


def jobs(platform: Platform) -> list[Any]:
    with platform.engine.connect() as connection:
        return list(connection.execute(text("SELECT name, state, request FROM jobs ORDER BY seq")))


@pytest.mark.long
def test_django_order_is_sent_on_commit_and_computed_with_its_settings(platform: Platform) -> None:
    move_into(platform, "django", "shop")
    migrated = python(platform, "manage.py", "migrate", "-v", "0")
    assert migrated.returncode == 0, migrated.stderr
    schedule = str(platform.folder / "schedule")
    settings = platform.folder / "shop" / "settings.py"
    settings.write_text(settings.read_text(encoding="utf-8").replace('"schedule": 60.0', '"schedule": 0.5'))
    worker = platform.start(
        *("w", "worker", "--loglevel", "INFO", "--beat", "--schedule", schedule, "--concurrency", "2"),
        says=READY,
        NODE_NAME="w",
        PLATFORM_CPUS="4",
    )
    assert "shop.orders.tasks.compute_total" in worker.tail()
    done = python(platform, "-c", ORDERS)
    assert done.returncode == 0, done.stderr
    taken, refused, orders, order = json.loads(done.stdout)
    assert (taken, refused, orders) == (202, 409, 1)
    assert (order["items"], order["total"]) == (6, 42)
    sent = [job for job in jobs(platform) if job.name == "shop.orders.tasks.compute_total"]
    assert [(job.state, job.request) for job in sent] == [
        ("succeeded", {"cpus": 2, "memory": 64 * 1024**2, "slots": 1})
    ]
    # Beat runs in the worker: it sends the project's own entry with its request, beside the platform's ticks.
    ran = until(
        lambda: [job for job in jobs(platform) if job.name.endswith("ship_paid") and job.state == "succeeded"],
        "beat sent what the project's settings schedule",
    )
    assert ran[0].request == {"cpus": 0.5, "slots": 1}
    worker.stop()


def test_the_projects_classes_and_settings_are_djangos_and_the_platforms(platform: Platform) -> None:
    move_into(platform, "django", "shop")
    shell = python(platform, "manage.py", "shell", "-v", "0", "-c", CLASSES)
    assert shell.returncode == 0, shell.stderr
    assert json.loads(shell.stdout.splitlines()[-1]) == {
        "tasks": ["shop.orders.tasks.compute_total", "shop.orders.tasks.ship_paid"],
        "django": True,
        "track": True,
        "consumer": "celery_capacity.workers.execute.consumer:Consumer",
        "beat": ["platform: heartbeat", "platform: reconcile", "platform: sweep", "ship what was paid"],
    }
    # Without servers Django's own commands work as before.
    for name in ("REDIS_URL", "DATABASE_URL"):
        platform.environment.pop(name)
    checked = python(platform, "manage.py", "check")
    assert checked.returncode == 0, checked.stderr
