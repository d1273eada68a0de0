"""A hook of mkdocs: the pages work in the site as they do in the repository.

- Files outside of `docs/` that a page links to come into the site. A page names such a file by its path in the
  repository, `../../deploy/redis.acl`. In the site the file lies in `repository/`. The changelog and the READMEs become
  pages, and so do lists of the files of folders.
- Anchors are those that GitHub makes of headings.
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

#: Pages of the root, and their places in the site. A page `README.md` would become the first page of its folder.
PAGES: Final = {
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "repository/contributing.md",
    "README.md": "repository/readme.md",
    "README.zh.md": "repository/readme.zh.md",
    "SECURITY.md": "repository/security.md",
    "CODE_OF_CONDUCT.md": "repository/code-of-conduct.md",
}

_LINK: Final = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def slug(heading: str, _separator: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _source(page: str) -> str:
    """Return the path in the repository of a page of the site."""
    return next((source for source, place in PAGES.items() if place == page), f"docs/{page}")


def _place(source: str) -> str | None:
    """Return the place in the site of a file or folder of the repository; None if it is not in the site."""
    if source in PAGES:
        return PAGES[source]
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    if (ROOT / source).is_dir():
        return f"repository/{source}/index.md"
    return f"repository/{source}" if (ROOT / source).exists() else None


def _target(page: str, link: str) -> str | None:
    """Return the path in the repository of a link on a page of the site; None for a link to another site."""
    if "://" in link or link.startswith("mailto:"):
        return None
    return normpath(f"{dirname(_source(page)) or '.'}/{link}")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs["toc"]["slugify"] = slug
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    added = {"CHANGELOG.md"}
    pages = [file.src_uri for file in files.documentation_pages()] + ["CHANGELOG.md"]
    while pages:
        page = pages.pop()
        for link in _LINK.findall((ROOT / _source(page)).read_text(encoding="utf-8")):
            target = _target(page, link)
            place = None if target is None else _place(target)
            if target is None or place is None or target.startswith("docs/") or target in added:
                continue
            added.add(target)
            if target in PAGES:
                pages.append(place)
    for folder in sorted(target for target in added if (ROOT / target).is_dir()):
        names = sorted(path.name for path in (ROOT / folder).iterdir() if path.is_file())
        listed = "\n".join([f"# {folder}", "", *(f"- [{name}]({name})" for name in names)])
        files.append(File.generated(config, str(_place(folder)), content=listed))
        added |= {f"{folder}/{name}" for name in names}
        added.remove(folder)
    for source in sorted(added):
        files.append(File.generated(config, str(_place(source)), abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    if here.startswith("repository/") and here not in PAGES.values():
        return markdown  # made above, with its links

    def placed(link: re.Match[str]) -> str:
        target = _target(here, link[0])
        place = None if target is None else _place(target)
        return link[0] if place is None else relpath(place, dirname(here) or ".")

    return _LINK.sub(placed, markdown)
