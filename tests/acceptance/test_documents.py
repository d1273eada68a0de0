"""What the documents say of the code, held against the code: links, commands and options, the crash table, keys,
counters, deadlines, and the words of the glossary."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import click
import pytest

import routing
from routing import keys
from routing.settings import Settings
from tests.fixtures.processes import ROOT

DOCS: Final = ROOT / "docs"
HOW: Final = DOCS / "DYNAMIC_RESOURCE_MANAGEMENT.md"
PAGES: Final = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])

_LINK: Final = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
_FENCE: Final = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_documents_resolve(page: Path) -> None:
    broken = []
    for link in _LINK.findall(prose(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    to_read = [ROOT / "README.md"]
    while to_read:
        page = to_read.pop()
        seen.add(page)
        links = {link.partition("#")[0] for link in _LINK.findall(prose(page)) if "://" not in link}
        found = {(page.parent / link).resolve() for link in links if link.endswith(".md")}
        to_read += sorted(found - seen - set(to_read))
    assert set(PAGES) - seen == set()


def rows(page: Path, header: str) -> Iterator[list[str]]:
    """The cells of each table of a page that has this header."""
    inside = False
    for line in prose(page).splitlines():
        if not line.startswith("|"):
            inside = False
        elif line == header:
            inside = True
        elif inside and not line.startswith("| ---"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_crash_table_is_that_of_the_protocol() -> None:
    essay = (routing.__doc__ or "").splitlines()
    rules = [number for number, line in enumerate(essay) if line.startswith("====") and "  " in line]
    second = essay[rules[0]].rindex(" ") + 1
    told: list[list[str]] = []
    for line in essay[rules[1] + 1 : rules[2]]:
        left, right = line[:second].strip(), line[second:].strip()
        if left:
            told.append([left, right])
        else:
            told[-1][1] += f" {right}"
    assert list(rows(HOW, "| the process dies | repaired by |")) == told


def test_every_key_is_listed() -> None:
    listed = {name.strip("`") for cells in rows(HOW, "| key | type | holds |") for name in cells[:1]}
    assert {name.partition("<")[0] for name in listed} == set(keys.KEYS.values())


def test_every_counter_is_explained() -> None:
    # A cancel counts under the state that it makes; reconcile counts in Python, and so does a refused attempt.
    counted = {"cancelled", "expired", "drift"}
    for path in [*(ROOT / "routing").glob("*.py"), *(ROOT / "workers").rglob("*.py")]:
        counted |= set(re.findall(r"\bledger\.count\(\"([\w.]+)\"", path.read_text(encoding="utf-8")))
    for path in (ROOT / "routing" / "lua").glob("*.lua"):
        counted |= set(re.findall(r"\bcount\('([\w.]+)'", path.read_text(encoding="utf-8")))
    told = " ".join(cells[0] for cells in rows(HOW, "| counter | counts | in a healthy platform |"))
    assert set(re.findall(r"`([\w.]+)`", told)) == counted


def test_the_deadlines_are_the_defaults_of_the_settings() -> None:
    meanings = [field.metadata["setting"] for field in fields(Settings) if "setting" in field.metadata]
    seconds = {meaning.env: meaning.shown for meaning in meanings if meaning.unit == "seconds"}
    told = {cells[1].strip("`"): cells[2] for cells in rows(HOW, "| name | setting | default | when it is over |")}
    assert told == seconds


def command(name: str) -> click.Command:
    """The command that stands behind a heading of the reference: `up`, `db upgrade`."""
    if name == "origins":
        found: click.Command = import_module("celery_capacity")._origins
        return found
    first, _, second = name.partition(" ")
    of: Any = import_module(f"platform.commands.{first}").command
    return of.commands[second] if second else of  # type: ignore[no-any-return]


def test_the_reference_has_every_command_with_all_its_options() -> None:
    text = _FENCE.sub("", (DOCS / "reference" / "commands.md").read_text(encoding="utf-8"))
    told = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[2:]:
        name, _, body = section.partition("\n")
        options = re.findall(r"^\| (`-.*?) \|", body, re.MULTILINE)
        told[name] = set(re.findall(r"`(-[\w-]+)", " ".join(options)))
    names = [path.stem for path in (ROOT / "platform" / "commands").glob("*.py") if path.stem != "__init__"]
    names += ["origins", *(f"db {name}" for name in command("db").commands)]  # type: ignore[attr-defined]
    names.remove("db")
    expected = {}
    for name in names:
        options = [option for option in command(name).params if isinstance(option, click.Option)]
        expected[name] = {text for option in options for text in option.opts}
    assert told == expected


def named(path: str) -> Any:
    """What a dotted name of the glossary stands for."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            annotated = getattr(found, "__dataclass_fields__", {})
            found = annotated[part] if part in annotated else getattr(found, part)
        return found
    raise ModuleNotFoundError(path)


def test_every_word_of_the_glossary_is_a_name_in_the_code() -> None:
    words = list(rows(DOCS / "glossary.md", "| word | means | in the code |"))
    assert len(words) > 30
    for cells in words:
        found = re.findall(r"`([\w.]+)`", cells[-1])
        assert found or cells[1].startswith("not used"), cells[0]
        for name in found:
            assert named(name) is not None, name
