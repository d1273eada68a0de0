"""Names of tasks and workers: completed wherever a command takes one, and compared with patterns."""

from __future__ import annotations

import pytest

from celery_capacity.platform.console.job_ids import complete_id
from celery_capacity.platform.console.names import complete_task, complete_worker, is_like
from tests.fixtures.documents.shapes import commands

#: Completion of each parameter that takes a name.
COMPLETED = {"task": complete_task, "worker": complete_worker, "workers": complete_worker, "jobs": complete_id}
#: Commands that take workers to start, of which no store knows.
STARTS = {"up", "demo", "simulate", "whatif"}


def test_every_name_of_a_task_worker_or_job_is_completed() -> None:
    missing = [
        f"{name} {parameter.name}"
        for name, command in commands().items()
        if name not in STARTS
        for parameter in command.params
        if parameter.name in COMPLETED and parameter._custom_shell_complete is not COMPLETED[parameter.name]
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("name", "pattern", "like"),
    [("video.cut", "video.*", True), ("a[1]", "a[1]", True), ("ab", "a?", False), ("Video", "video", False)],
)
def test_star_alone_stands_for_any_text(name: str, pattern: str, like: bool) -> None:
    assert is_like(name, pattern) is like
