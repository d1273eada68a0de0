"""The web page of the cluster and its HTTP API, in one process: `celery -A platform dashboard`."""
