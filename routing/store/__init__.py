"""The durable truth in Postgres: one file for each group of statements."""
