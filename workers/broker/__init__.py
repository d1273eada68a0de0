"""Kombu's side: transports that survive garbage, queues, the messages of beat."""
