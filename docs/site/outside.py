"""A hook of mkdocs: what the pages link to outside of `docs/` comes into the site, so that links work there as they do
in the repository.

A page names such a file as the repository has it, `../../deploy/redis.acl`; in the site it lies in `repository/`. The
changelog becomes a page of its own.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parents[2]

#: Where files of the repository lie in the site. Not their own names: a `README.md` would become the first page.
FOLDER: Final = "repository"

CHANGELOG: Final = "CHANGELOG.md"

_LINK: Final = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def _in_site(page: str, link: str) -> str | None:
    """The place in the site of what a page links to, where that is outside of `docs/`; else None."""
    if "://" in link or link.startswith("mailto:"):
        return None
    # The changelog's own folder is the root, that of all other pages is below docs/.
    folder = "." if page == CHANGELOG else f"docs/{dirname(page)}"
    path = normpath(f"{folder}/{link}")
    if path.startswith("docs/"):
        return path.removeprefix("docs/") if page == CHANGELOG else None
    if path == CHANGELOG:
        return CHANGELOG
    return f"{FOLDER}/{path}" if (ROOT / path).is_file() else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, CHANGELOG, abs_src_path=str(ROOT / CHANGELOG)))
    linked: set[str] = set()
    for file in files.documentation_pages():
        for link in _LINK.findall(file.content_string):
            place = _in_site(file.src_uri, link)
            if place and place.startswith(f"{FOLDER}/"):
                linked.add(place)
    for place in sorted(linked):
        source = ROOT / place.removeprefix(f"{FOLDER}/")
        files.append(File.generated(config, place, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def placed(link: re.Match[str]) -> str:
        place = _in_site(page.file.src_uri, link[0])
        return link[0] if place is None else relpath(place, dirname(page.file.src_uri) or ".")

    return _LINK.sub(placed, markdown)
