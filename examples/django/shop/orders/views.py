"""Views that send tasks."""

from django.db import transaction
from django.http import HttpRequest, HttpResponse, JsonResponse

from shop.orders.models import Order
from shop.orders.tasks import compute_total


def take(request: HttpRequest) -> HttpResponse:
    """Store an order and have its total computed. A transaction that is rolled back sends nothing."""
    with transaction.atomic():
        order = Order.objects.create(items=int(request.POST["items"]))
        compute_total.delay_on_commit(order.pk)
        if order.items > 100:
            transaction.set_rollback(True)
            return JsonResponse({"error": "we have no more than 100"}, status=409)
    return JsonResponse({"number": order.pk}, status=202)


def show(request: HttpRequest, number: int) -> HttpResponse:
    """Show an order as it is now."""
    order = Order.objects.get(pk=number)
    return JsonResponse({"items": order.items, "total": order.total, "shipped": order.shipped})
