"""The CPU time of Redis, by its own count."""

from __future__ import annotations

from typing import Any, Final

#: Fields of `INFO cpu`: the thread that carries out commands, without those that free memory or write files.
FIELDS: Final = ("used_cpu_user_main_thread", "used_cpu_sys_main_thread")


def main_thread_seconds(client: Any) -> float:
    """Return the seconds of CPU that the server's main thread has taken since its start."""
    usage = client.info("cpu")
    return float(sum(usage[name] for name in FIELDS))
