"""README as a newcomer reads it: its Python runs, its commands do what it shows, its redis-cli and curl lines answer.

tests/fixtures/documents/replay.py replays it.
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Final

import pytest

from celery_capacity.routing.config.embedded import running_pair
from tests.fixtures.documents.replay import LOOKED_AT, Block, Terminal, blocks_of, sections
from tests.fixtures.processes.platforms import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "try"


README: Final = sections(ROOT / "README.md")
#: Words of a page that sells the project on one screen.
MAX_WORDS: Final = 900


def test_the_two_commands_are_there(folder: Path) -> None:
    Terminal(folder).replay([Block("console", tuple(b.lines)) for b in README["See it work"]])
    first = [command for block in README["See it work"] for command, _ in block.commands()]
    assert first == ["make demo", "make test"]


@pytest.mark.long(60)
def test_a_newcomer_runs_tasks_looks_at_them_and_ends_it(folder: Path) -> None:
    # The settings of a newcomer, who has none.
    terminal = Terminal(folder)
    try:
        *start, end = README["Run a task of your own"]
        terminal.replay(start)
        (folder / LOOKED_AT).touch()
        terminal.replay([end])
    finally:
        terminal.leave()
    assert running_pair(folder / "home") is None


def test_every_section_with_lines_to_type_is_replayed() -> None:
    typed = {name for name, blocks in README.items() if any(block.language != "diff" for block in blocks)}
    assert typed == {"See it work", "Run a task of your own"}


def test_readme_is_one_screen() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= MAX_WORDS


def test_plain_celery_beside_ours_is_both_python() -> None:
    (block,) = README["What changes in your code?"]
    for side, other in (("+", "-"), ("-", "+")):
        code = "\n".join(line[1:] for line in block.lines if not line.startswith(other))
        compile(code, f"the lines with {side}", "exec")


def test_the_chinese_readme_has_the_same_lines() -> None:
    assert blocks_of(ROOT / "README.zh.md") == blocks_of(ROOT / "README.md")


def test_the_versions_of_the_first_screen_are_those_of_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    pythons = re.findall(r"Python :: (\d\.\d+)", setup["metadata"]["classifiers"])
    celery = re.search(r"celery>=(\d\.\d+)", setup["options"]["install_requires"])
    assert celery is not None
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"Python {pythons[0]} to {pythons[-1]} · Celery {celery[1]} · [{setup['metadata']['license']}]" in text
