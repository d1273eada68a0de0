"""Every page of docs/ as its reader uses it: each line to type is typed, in order, in a fresh folder."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from celery_capacity.routing.config.embedded import running_pair
from tests.fixtures.documents.replay import Terminal, blocks_of
from tests.fixtures.processes.platforms import ROOT
from tests.fixtures.servers.pair import TENTH

DOCS: Final = ROOT / "docs"

#: Languages of blocks that a reader types or saves as they are. Other blocks show something, or are to be
#: adapted, such as those in `sh`.
TYPED: Final = ("console", "bash", "python", "sql")


def is_run(page: Path) -> bool:
    return any(block.language in TYPED and not block.not_run for block in blocks_of(page))


#: The page of which a reader types most, each line by the installed script, and about how many seconds that takes.
TUTORIAL: Final = DOCS / "tutorial.md"
TUTORIAL_SECONDS: Final = 160

RUN: Final = [
    pytest.param(
        page,
        id=str(page.relative_to(DOCS)),
        marks=pytest.mark.long(TUTORIAL_SECONDS) if page == TUTORIAL else pytest.mark.long(30),
    )
    for page in sorted(DOCS.rglob("*.md"))
    if is_run(page)
]


@pytest.mark.parametrize("page", RUN)
def test_what_a_page_says_to_type_works(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    text = page.read_text(encoding="utf-8")
    servers_of_ones_own = "export REDIS_URL=" in text or "```sql" in text
    # Without processes for each CPU: this machine may have many.
    variables = {"PLATFORM_CPUS": "4", **TENTH}
    if servers_of_ones_own:
        variables["REDIS_URL"] = request.getfixturevalue("redis_url")
        variables["DATABASE_URL"] = request.getfixturevalue("database_url")
    # The tutorial types the installed script, as the README does.
    terminal = Terminal(tmp_path / "try", forks=page != TUTORIAL, **variables)
    try:
        terminal.replay(blocks_of(page))
        terminal.ctrl_c()
    finally:
        terminal.leave()
    assert running_pair(tmp_path / "try" / "home") is None
