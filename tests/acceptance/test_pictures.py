"""Pictures of the documents: they show without a network, and the terminal in them shows commands that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import pytest

from docs.site import backfill, shares
from docs.site.pictures import PICTURES, SCREENS, draw

FILES: Final = sorted(PICTURES.glob("*.svg"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_picture_asks_no_server_for_anything(path: Path) -> None:
    svg = path.read_text(encoding="utf-8")
    ElementTree.fromstring(svg)
    addresses = set(re.findall(r"https?://[^\"')\s]+", svg))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert "@font-face" not in svg


def test_each_screen_is_drawn_with_its_commands() -> None:
    for name, commands in SCREENS.items():
        svg = (PICTURES / f"{name}.svg").read_text(encoding="utf-8").replace("&#160;", " ")
        assert [command for command in commands if command not in svg] == []


def test_drawn_output_keeps_its_words_and_colours() -> None:
    svg = draw("one", [("celery -A platform jobs", "\x1b[31mfailed\x1b[0m  a < b\n")])
    assert "failed" in svg
    assert "a&#160;&lt;&#160;b" in svg
    assert "#ff7b72" in svg


def test_picture_of_a_backfill_is_what_the_policy_does() -> None:
    assert backfill.PICTURE.read_text(encoding="utf-8") == backfill.draw(), "run python -m docs.site.backfill"


def test_picture_of_shares_is_what_the_policy_does() -> None:
    assert shares.PICTURE.read_text(encoding="utf-8") == shares.draw(), "run python -m docs.site.shares"
