"""The table of orders."""

from django.db import migrations, models


class Migration(migrations.Migration):
    """First migration."""

    initial = True
    operations = [  # noqa: RUF012 - as Django writes it
        migrations.CreateModel(
            name="Order",
            fields=[
                ("id", models.AutoField(primary_key=True)),
                ("items", models.IntegerField()),
                ("total", models.IntegerField(null=True)),
                ("shipped", models.BooleanField(default=False)),
            ],
        )
    ]
