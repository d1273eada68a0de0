"""Bars of commands that read all jobs: they count the jobs, of how many, and nothing is drawn off a terminal."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
from click.testing import CliRunner

from celery_capacity.platform.commands import reconcile, verify
from celery_capacity.platform.planning import whatif
from celery_capacity.routing.model.expected import RunTime
from celery_capacity.workers.display import progress_bar
from celery_capacity.workers.process.stores import Stores
from tests.fixtures.stores.staged import Stage

#: Commands with their arguments, and the end of each bar: three jobs, of which whatif simulates two futures.
COMMANDS = {
    "whatif": (whatif, ("--add-worker", "big=8"), "6/6"),
    "verify": (verify, (), "3/3"),
    "reconcile": (reconcile, (), "3/3"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_bar_counts_the_jobs_of_how_many(name: str, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    command, arguments, end = COMMANDS[name]
    stage.worker("a", cpus=1000)
    for _ in range(3):
        stage.submit(cpus=1000, run_time=RunTime(1000, 1000))
    monkeypatch.setattr(progress_bar, "AFTER", 0.0)
    _report(command, arguments, stage, monkeypatch, drawn="")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    _report(command, arguments, stage, monkeypatch, drawn=end)


def _report(
    command: ModuleType, arguments: tuple[str, ...], stage: Stage, monkeypatch: pytest.MonkeyPatch, drawn: str
) -> None:
    stores = Stores(lambda _: stage.settings)
    stores._made.update(settings=stage.settings, engine=stage.engine, ledger=stage.ledger)
    monkeypatch.setattr(command, "stores_of", lambda _: stores)
    result = CliRunner().invoke(command.command, [*arguments, "--json"], catch_exceptions=False)
    json.loads(result.stdout)
    assert drawn in result.stderr if drawn else result.stderr == ""
