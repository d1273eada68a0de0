"""Redis and Postgres of the user's own, started without root or Docker."""
