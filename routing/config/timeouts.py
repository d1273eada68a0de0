"""How long a process waits for its stores: parts of one setting, PLATFORM_STORE_TIMEOUT, so that all grow and shrink
with it. Seconds are `part * settings.store_timeout`."""

from __future__ import annotations

from typing import Final

#: The setting's default, in seconds: for who has no settings.
STORE_TIMEOUT: Final = 10.0

#: For a connection to Redis, and for an answer of it.
CONNECT: Final = 0.3
ANSWER: Final = 0.5
#: For a connection to a Sentinel, and for its answer.
SENTINEL: Final = 0.1
#: For an answer of Redis to one who can do without: who submits, who looks whether it is there again; and for all that
#: one attempt of a submitter asks, the questions of a new connection included.
QUICK_ANSWER: Final = 0.1
QUICK_ATTEMPT: Final = 0.3
#: For a lock of Postgres, and for the statement that inserts new jobs.
LOCK: Final = 0.25
INSERT: Final = 0.8
#: Until Postgres has what a worker noted, before that worker acts on it.
FLUSH: Final = 0.5
#: For each step of a worker's departure.
LEAVE: Final = 0.5
#: For the workers that live to open their books in a new epoch.
REPORT: Final = 0.2
