"""Orders and their items."""

from django.db import models


class Order(models.Model):
    """`total` is written by the task that computes it; None until then."""

    items = models.IntegerField()
    total = models.IntegerField(null=True)
    shipped = models.BooleanField(default=False)
