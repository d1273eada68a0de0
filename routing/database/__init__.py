"""Access to Postgres: the schema, connections, deadlines, and the store that decides."""
