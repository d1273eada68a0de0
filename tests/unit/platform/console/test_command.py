"""Stores of a command: those of the app where the command sends with the app."""

from __future__ import annotations

from importlib import import_module

import pytest
from click.testing import CliRunner

from celery_capacity.platform.console.command import Invocation
from celery_capacity.workers.app.install import create_app
from celery_capacity.workers.process.exit_codes import Exit

AWAY = {"REDIS_URL": "redis://127.0.0.1:1/0", "DATABASE_URL": "postgresql://me@127.0.0.1:1/platform"}


@pytest.mark.parametrize(
    "words",
    [
        ("submit", "demo.sleep", "--json"),
        ("cancel", "e4855c54"),
        ("cancel", "--task", "demo.*", "--yes"),
        ("retry", "e4855c54"),
        ("retry", "--failed", "--yes"),
    ],
)
def test_capacity_acts_on_the_stores_of_its_app(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AWAY.items():
        monkeypatch.setenv(name, value)
    invocation = Invocation(no_color=False)
    invocation.app = app = create_app("acting")
    command = import_module(f"celery_capacity.platform.actions.{words[0]}").command
    result = CliRunner().invoke(command, list(words[1:]), obj=invocation)
    assert result.exit_code == Exit.UNAVAILABLE, result.output
    assert "engine" in app.platform.made
    assert "stores" not in vars(invocation)
    app.close()
