"""The folders of the code as a Mermaid diagram, made of the imports: `python -m docs.site.folders`.

An arrow leads from a folder to one of which it imports, if it does not get there by another arrow already. A test holds
the page against it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGE: Final = "celery_capacity"
LAYERS: Final = ("platform", "workers", "routing")


def _folder(module: str) -> str | None:
    """`workers/submit` for `celery_capacity.workers.submit.sender`; None for a file beside the folders."""
    parts = module.split(".")
    if parts[:1] != [PACKAGE] or len(parts) < 3 or parts[1] not in LAYERS:
        return None
    return f"{parts[1]}/{parts[2]}" if (ROOT / parts[1] / parts[2]).is_dir() else None


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows() -> dict[str, set[str]]:
    """The folders of each layer, and of which others of the same layer they import."""
    found: dict[str, set[str]] = {}
    for layer in LAYERS:
        for path in sorted((ROOT / layer).glob("*/*.py")):
            own = f"{layer}/{path.parent.name}"
            targets = {_folder(name) for name in _imports(path)} - {own, None}
            found.setdefault(own, set()).update(name for name in targets if name and name.startswith(f"{layer}/"))
    return found


def _reach(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    pending = [start]
    while pending:
        for name in graph.get(pending.pop(), ()):
            if name not in seen:
                seen.add(name)
                pending.append(name)
    return seen


def _direct(graph: Mapping[str, set[str]], start: str) -> list[str]:
    """The targets that no other target leads to."""
    return sorted(
        name
        for name in graph[start]
        if not any(name in _reach(graph, other) for other in graph[start] if other != name)
    )


def diagram() -> str:
    """The text of the diagram."""
    graph = arrows()
    lines = ["flowchart TD"]
    for layer in LAYERS:
        lines.append(f"    subgraph {layer}")
        own = sorted(name for name in graph if name.startswith(f"{layer}/"))
        lines += [f"        {name.replace('/', '_')}[{name.partition('/')[2]}]" for name in own]
        lines.append("    end")
    lines += ["    platform --> workers --> routing"]
    for folder in sorted(graph):
        lines += [f"    {folder.replace('/', '_')} --> {name.replace('/', '_')}" for name in _direct(graph, folder)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(diagram())
