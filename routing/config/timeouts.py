"""Timeouts of a process that waits for its stores.

They are parts of one setting, PLATFORM_STORE_TIMEOUT, so that all grow and shrink with it. A timeout in seconds is
`part * settings.store_timeout`.
"""

from __future__ import annotations

from typing import Final

#: The setting's default in seconds, for a caller without settings.
STORE_TIMEOUT: Final = 10.0

#: For a connection to Redis, and for an answer from Redis.
CONNECT: Final = 0.3
ANSWER: Final = 0.5
#: For a connection to a Sentinel, and for its answer.
SENTINEL: Final = 0.1
#: For an answer from Redis to a caller that can do without: a submitter, or a process that looks whether Redis is back.
#: Then for all questions in one attempt of a submitter, those of a new connection included.
QUICK_ANSWER: Final = 0.1
QUICK_ATTEMPT: Final = 0.3
#: For a lock of Postgres, and for the statement that inserts new jobs.
LOCK: Final = 0.25
INSERT: Final = 0.8
#: Until Postgres has a worker's notes, before that worker acts on them.
FLUSH: Final = 0.5
#: For each step of a worker's departure.
LEAVE: Final = 0.5
#: For the live workers to open their books in a new epoch.
REPORT: Final = 0.2
