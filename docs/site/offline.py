"""A hook of mkdocs: the site shows whole from a disk, without a network.

- A page with diagrams brings the script that draws them: `@mermaid-js/tiny` 11.17.2, as npm has it. Pages without a
  diagram do not load it, since it has 2.5 MB.
- The search brings `iframe-worker` 1.0.4, which the theme needs on a disk and would ask an address for.
- A page that would fetch something from an address is a warning, and so an error of `make docs`.

Each script has its licence beside it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from posixpath import dirname, relpath
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger(f"mkdocs.plugins.{__name__}")

VENDOR: Final = Path(__file__).parent / "vendor"
PLACE: Final = "assets/vendor"
FETCHED: Final = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc="(https?://[^"]+)|<link[^>]*rel="stylesheet"[^>]*href="(https?://[^"]+)"""
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(VENDOR.iterdir()):
        files.append(File.generated(config, f"{PLACE}/{path.name}", abs_src_path=str(path)))
    return files


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    if '<pre class="mermaid">' in output:
        script = relpath(f"{PLACE}/mermaid.tiny.js", dirname(page.file.dest_uri) or ".")
        output = output.replace("</head>", f'<script src="{script}"></script></head>', 1)
    for addresses in FETCHED.findall(output):
        log.warning("%s fetches %s, which a reader without a network does not have", page.file.src_uri, max(addresses))
    return output
