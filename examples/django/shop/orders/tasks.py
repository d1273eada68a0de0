"""Tasks of the shop, found by `autodiscover_tasks`. A heavy task says what it needs; any other asks for one CPU."""

from celery import shared_task
from django.db import transaction

from shop.orders.models import Order

PRICE = 7


@shared_task(cpus=2, memory="64MiB")
def compute_total(number: int) -> int:
    """Compute the total. The order is there: its transaction committed before the job was sent."""
    order = Order.objects.get(pk=number)
    order.total = order.items * PRICE
    order.save(update_fields=["total"])
    return order.total


@shared_task
def ship_paid() -> int:
    """Run every minute, by beat."""
    with transaction.atomic():
        return Order.objects.filter(total__isnull=False, shipped=False).update(shipped=True)
