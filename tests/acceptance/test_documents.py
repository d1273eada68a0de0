"""Check what the documents say of the code: links, commands and options, reasons, and deadlines.

The words of the glossary are checked here too. The lines that the documents tell a reader to type are
run in test_readme.py and test_pages.py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import click
import pytest
from celery.bin.celery import celery

from celery_capacity.platform.capacity import CELERY, capacity
from celery_capacity.routing.config.settings import described
from celery_capacity.routing.model.reasons import EXPLAINED, Reason
from celery_capacity.workers import plugin
from celery_capacity.workers.plugin import COMMANDS, Lazy
from docs.site import folders
from tests.fixtures.documents.replay import blocks_of
from tests.fixtures.processes.platforms import ROOT

DOCS: Final = ROOT / "docs"
HOW: Final = DOCS / "DYNAMIC_RESOURCE_MANAGEMENT.md"
PAGES: Final = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])

_LINK: Final = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE: Final = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """Return the page without its code blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the link names of a page's headings, as GitHub makes them.

    The second of two equal headings gets a number.
    """
    names: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"\]\([^)]*\)", "", heading.lower())
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        names.add(
            next(candidate for candidate in (name, *(f"{name}-{n}" for n in range(1, 99))) if candidate not in names)
        )
    return names


def is_address(link: str) -> bool:
    """Return True if an external link has the form of an address.

    Only a network could tell if something answers there.
    """
    try:
        parts = urlsplit(link)
        port_is_number = parts.port is None or parts.port > 0
    except ValueError:
        return False
    return parts.scheme == "https" and "." in (parts.hostname or "") and port_is_number


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    broken = []
    for link in _LINK.findall(prose(page)):
        if "://" in link:
            broken += [] if is_address(link) else [link]
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize(
    ("link", "right"),
    [
        ("https://keepachangelog.com/en/1.1.0/", True),
        ("http://keepachangelog.com", False),
        ("https://keepachangelog", False),
        ("https://example.org:port/", False),
    ],
)
def test_an_external_link_is_judged_by_its_form(link: str, right: bool) -> None:
    assert is_address(link) == right


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lists_are_drawn_alike_here_and_in_the_site(page: Path) -> None:
    # The site takes a list inside a list only by four spaces, and a list only after an empty line.
    wrong = re.findall(r"^ {1,3}(?:[-*]|\d+\.) .*$", prose(page), re.MULTILINE)
    wrong += re.findall(r"^(?![-*#|>< ]|\d+\. ).+\n(?:[-*]|1\.) .*$", prose(page), re.MULTILINE)
    wrong += re.findall(r"\n\n    (?![ *-]).+(?:\n    .+)*\n((?:[-*]|\d+\.) .*)$", prose(page), re.MULTILINE)
    assert wrong == []


def test_the_chinese_readme_has_all_that_the_english_one_has() -> None:
    english, chinese = (prose(ROOT / name) for name in ("README.md", "README.zh.md"))
    for pattern in (r"^(#+) ", r"^(\|)", r"^(- )", r"(`[^`\n]+`)"):
        in_english, in_chinese = (sorted(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese))
        assert in_english == in_chinese, pattern
    links = [sorted(link.partition("#")[0] for link in _LINK.findall(text)) for text in (english, chinese)]
    links[1] = [{"README.md": "README.zh.md"}.get(link, link) for link in links[1]]
    assert links[0] == sorted(links[1])


def test_every_page_is_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    to_read = [ROOT / "README.md"]
    while to_read:
        page = to_read.pop()
        seen.add(page)
        links = {link.partition("#")[0] for link in _LINK.findall(prose(page)) if "://" not in link}
        linked = {(page.parent / link).resolve() for link in links if link.endswith(".md")}
        to_read += sorted(linked - seen - set(to_read))
    assert set(PAGES) - seen == set()


def rows(page: Path, header: str) -> Iterator[list[str]]:
    """Yield the cells of each row, in each table of a page that has this header."""
    inside = False
    for line in prose(page).splitlines():
        if not line.startswith("|"):
            inside = False
        elif line == header:
            inside = True
        elif inside and not line.startswith("| ---"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_named_deadlines_are_settings() -> None:
    seconds = {meaning.env for _, meaning in described() if meaning.unit == "seconds"}
    named_settings = [cells[1].strip("`") for cells in rows(HOW, "| name | setting |")]
    assert len(named_settings) > 5
    assert set(named_settings) <= seconds


def test_every_reason_to_wait_is_told() -> None:
    page = DOCS / "explanation" / "why-does-it-wait.md"
    documented = [cells[0].strip("`") for cells in rows(page, "| `why` | it says | it means | what to do |")]
    assert documented == [why.value for why in EXPLAINED if why not in (Reason.RUNS, Reason.ENDED)]


def command(name: str) -> click.Command:
    """Return the command that stands behind a heading of the reference: `up`, `db upgrade`."""
    first, _, second = name.partition(" ")
    of: Any = getattr(plugin, first).load()
    return of.commands[second] if second else of  # type: ignore[no-any-return]


_TYPED: Final = re.compile(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*(?:celery -A (?:platform|proj)|capacity(?: -A proj)?) (.+)$")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_is_shown_is_there_with_its_options(page: Path) -> None:
    # The lines of blocks that are not run are checked, too.
    for line in (line for block in blocks_of(page) for line in block.lines):
        match = _TYPED.match(line)
        if match is None:
            continue
        words = shlex.split(match[1])
        name = " ".join(words[:2]) if words[0] in ("db", "tenant") else words[0]
        if name in celery.commands and not isinstance(celery.commands[name], Lazy):
            if name == "flower":
                continue  # Flower reads its options by itself
            meant = celery.commands[name]
        else:
            meant = command(name)
        options = {text for option in meant.params for text in option.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_that_is_shown_is_python(page: Path) -> None:
    for block in blocks_of(page):
        # A signature of the reference is not a statement.
        if block.language == "python" and not block.not_run.startswith("a signature"):
            compile("\n".join(block.lines), str(page), "exec")


def test_script_and_celery_have_the_commands_of_the_reference() -> None:
    """All names of the list of commands lead to one command, whichever of the two is typed."""
    headings = re.findall(
        r"^## ([a-z]+)", (DOCS / "reference" / "commands.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    names = {str(stand_in.name) for stand_in in COMMANDS}
    assert set(headings) == names
    context = click.Context(capacity)
    for name in names | set(CELERY):
        assert capacity.get_command(context, name) is not None
        assert name in celery.commands
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert "console_scripts =\n    capacity = celery_capacity.platform.script:main\n" in setup


def test_the_reference_has_the_lines_of_completion_for_each_shell() -> None:
    text = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    for shell in ("bash", "zsh", "fish"):
        assert f"_CAPACITY_COMPLETE={shell}_source capacity" in text


def named(path: str) -> Any:
    """Return the object that a dotted name of the glossary stands for."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            target: Any = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            annotated = getattr(target, "__dataclass_fields__", {})
            target = annotated[part] if part in annotated else getattr(target, part)
        return target
    raise ModuleNotFoundError(path)


def test_the_diagram_of_the_folders_is_that_of_the_imports() -> None:
    page = (DOCS / "explanation" / "find-your-way.md").read_text(encoding="utf-8")
    drawing = re.search(r"```mermaid\n(.*?)\n```", page, re.DOTALL)
    assert drawing
    assert drawing[1] == folders.diagram(), "python -m docs.site.folders prints it"


def test_every_file_of_the_way_through_the_code_is_there() -> None:
    page = (DOCS / "explanation" / "find-your-way.md").read_text(encoding="utf-8")
    paths = re.findall(r"`([a-z_]+/[\w/.]*)`", page)
    assert len(paths) > 30
    assert [name for name in paths if not (ROOT / name).exists()] == []


def test_every_word_of_the_glossary_is_a_name_in_the_code() -> None:
    words = list(rows(DOCS / "glossary.md", "| word | means | in the code |"))
    assert len(words) > 30
    for cells in words:
        names = re.findall(r"`([\w.]+)`", cells[-1])
        assert names or cells[1].startswith("not used"), cells[0]
        for name in names:
            assert named(name) is not None, name


def test_every_page_is_in_the_navigation_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r": ([\w./-]+\.md)$", text[text.index("\nnav:") :], re.MULTILINE)
    assert sorted(listed) == sorted([*(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")), "CHANGELOG.md"])


#: Messages of other programs on the page of troubleshooting.
FOREIGN_MESSAGES: Final = {"celery: command not found", "No such command 'cluster'", "Address already in use"}


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    folders = ("platform", "routing", "workers")
    code = "\n".join(path.read_text(encoding="utf-8") for name in folders for path in (ROOT / name).rglob("*.py"))
    code = re.sub(r"\"\s+f?\"", "", code)
    cells = [cells[0] for cells in rows(DOCS / "troubleshooting.md", "| you see | it means | do |")]
    messages = {text for cell in cells for text in re.findall(r"`([^`]+ [^`]+)`", cell)} - FOREIGN_MESSAGES
    parts = {part.strip(" :") for message in messages for part in message.split("…")}
    assert {part for part in parts if part and not re.search(r"\d", part) and part not in code} == set()
