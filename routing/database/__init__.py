"""Postgres as it is reached: the schema, connections, deadlines, and which store decides."""
