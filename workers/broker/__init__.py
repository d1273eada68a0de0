"""What goes by kombu: transports that survive garbage, queues, the messages of beat."""
