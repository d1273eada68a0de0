"""Found by `autodiscover_tasks`. Tasks that are heavy say what they need; the others ask for one CPU."""

from celery import shared_task
from django.db import transaction

from shop.orders.models import Order

PRICE = 7


@shared_task(cpus=2, memory="64MiB")
def compute_total(number: int) -> int:
    """The order is there: the job was sent when its transaction had committed."""
    order = Order.objects.get(pk=number)
    order.total = order.items * PRICE
    order.save(update_fields=["total"])
    return order.total


@shared_task
def ship_paid() -> int:
    """Every minute, by beat."""
    with transaction.atomic():
        return Order.objects.filter(total__isnull=False, shipped=False).update(shipped=True)
