"""Properties of a message that its job carries."""

from __future__ import annotations

from celery_capacity.workers.submit.encode import _wire_properties


def test_job_carries_no_headers_and_types_of_rabbitmq() -> None:
    """Kombu's message of RabbitMQ has among its properties all that it has as attributes too."""
    received = {
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "application_headers": {"kwargsrepr": "{'password': 'secret'}", "id": "a"},
        "cluster_id": "rabbit",
        "delivery_mode": 2,
        "priority": 3,
        "correlation_id": "a",
        "reply_to": "b",
        "type": "invoice",
    }
    assert _wire_properties(received, "q", 3, expires=False) == {
        "type": "invoice",
        "correlation_id": "a",
        "reply_to": "b",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": "q"},
        "priority": 3,
    }
