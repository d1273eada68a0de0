"""Text of a command line that no store can hold."""

from __future__ import annotations

import click
import pytest

from celery_capacity.platform.console.text_type import Text
from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.processes.commanding import in_process

#: A byte that is no UTF-8, as Python reads it from a command line.
BAD = "\udcff"
AWAY = {"REDIS_URL": "redis://127.0.0.1:1/0", "DATABASE_URL": "postgresql://me@127.0.0.1:1/platform"}


def test_text_is_taken_as_it_is() -> None:
    assert Text().convert("wörker-*", None, None) == "wörker-*"


def test_text_that_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="is no text in UTF-8"):
        Text().convert(BAD, None, None)


@pytest.mark.parametrize(
    "words",
    [
        ("jobs", "--task", BAD),
        ("jobs", "--worker", BAD),
        ("jobs", "--queue", BAD),
        ("jobs", "--group", BAD),
        ("cancel", "--task", BAD),
        ("cancel", "--group", BAD),
        ("retry", "--failed", "--task", BAD),
        ("submit", BAD),
        ("submit", "demo.sleep", "--queue", BAD),
        ("submit", "demo.sleep", "--args", f'["{BAD}"]'),
    ],
)
def test_commands_refuse_text_that_cannot_be_encoded(words: tuple[str, ...]) -> None:
    result = in_process(AWAY)(*words)
    assert result.exit_code == Exit.USAGE, result.output
    assert "is no text in UTF-8" in result.stderr
