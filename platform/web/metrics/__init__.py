"""Metrics of the dashboard for Prometheus: what is read for a scrape, what is counted, and how it is written."""
