"""Tasks whose arguments nobody else should read."""

from __future__ import annotations

from typing import Any

from celery import shared_task

from tests.fixtures.tasks import MAX_SECONDS, _client


@shared_task
def login(*args: Any, fail: bool = False, **kwargs: Any) -> int:
    if fail:
        raise ValueError("the login failed")
    return len(args) + len(kwargs)


@shared_task
def stay(gate: str, **kwargs: Any) -> None:
    """Report in the list `<gate>:started` that it runs, and wait to be let go."""
    with _client() as client:
        client.rpush(f"{gate}:started", "stay 0")
        client.blpop([f"{gate}:open"], MAX_SECONDS)
