"""README as a newcomer reads it: its Python runs, its commands do what it shows, its redis-cli and curl lines answer.

tests/fixtures/replay.py replays it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from celery_capacity.routing.config.embedded import running_pair
from tests.fixtures.processes import ROOT
from tests.fixtures.replay import LOOKED_AT, Block, Terminal, blocks_of, sections
from tests.fixtures.servers import TENTH


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "try"


README: Final = sections(ROOT / "README.md")


def test_the_two_commands_are_there(folder: Path) -> None:
    Terminal(folder).replay([Block("console", tuple(b.lines)) for b in README["See it work"]])
    first = [command for block in README["See it work"] for command, _ in block.commands()]
    assert first == ["make demo", "make test"]


@pytest.mark.long
def test_a_newcomer_runs_tasks_looks_at_them_and_ends_it(folder: Path) -> None:
    # The settings of a newcomer, who has none.
    terminal = Terminal(folder)
    try:
        terminal.replay(README["Run your own tasks"])
        terminal.replay(README["Look at it"])
        (folder / LOOKED_AT).touch()
        terminal.replay(README["Say what a call needs"])
        terminal.replay(README["Flower and beat"])
        terminal.replay(README["End it"])
    finally:
        terminal.leave()
    assert running_pair(folder / "home") is None


@pytest.mark.long
@pytest.mark.parametrize("section", ["Real servers", "A project that exists"])
def test_with_servers_of_ones_own(section: str, folder: Path, redis_url: str, database_url: str) -> None:
    # Without processes for each CPU: this machine may have many.
    variables = {"REDIS_URL": redis_url, "DATABASE_URL": database_url, "PLATFORM_CPUS": "4", **TENTH}
    terminal = Terminal(folder, **variables)
    try:
        terminal.replay(README[section])
        terminal.ctrl_c()
    finally:
        terminal.leave()


def test_every_section_with_lines_to_type_is_replayed() -> None:
    replayed = {"See it work", "Run your own tasks", "Look at it", "Say what a call needs", "Flower and beat", "End it"}
    assert {name for name, blocks in README.items() if blocks} == replayed | {"Real servers", "A project that exists"}


def test_the_chinese_readme_has_the_same_lines() -> None:
    assert blocks_of(ROOT / "README.zh.md") == blocks_of(ROOT / "README.md")
