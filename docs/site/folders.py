"""The folders of the code as a Mermaid diagram, made from the imports: `python -m docs.site.folders`.

An arrow leads from a folder to a folder that it imports, unless other arrows lead there already. A test compares the
page with the diagram.
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
    """Return `workers/submit` for `celery_capacity.workers.submit.sender`; None for a file beside the folders."""
    parts = module.split(".")
    if parts[:1] != [PACKAGE] or len(parts) < 3 or parts[1] not in LAYERS:
        return None
    return f"{parts[1]}/{parts[2]}" if (ROOT / parts[1] / parts[2]).is_dir() else None


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows() -> dict[str, set[str]]:
    """Return the folders of each layer, and for each the other folders of the layer that it imports."""
    imported: dict[str, set[str]] = {}
    for layer in LAYERS:
        for path in sorted((ROOT / layer).glob("*/*.py")):
            folder = f"{layer}/{path.parent.name}"
            targets = {_folder(name) for name in _imports(path)} - {folder, None}
            imported.setdefault(folder, set()).update(name for name in targets if name and name.startswith(f"{layer}/"))
    return imported


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
    """Return the targets that no other target leads to."""
    return sorted(
        name
        for name in graph[start]
        if not any(name in _reach(graph, other) for other in graph[start] if other != name)
    )


def diagram() -> str:
    """Return the text of the diagram."""
    graph = arrows()
    lines = ["flowchart TD"]
    for layer in LAYERS:
        lines.append(f"    subgraph {layer}")
        names = sorted(name for name in graph if name.startswith(f"{layer}/"))
        lines += [f"        {name.replace('/', '_')}[{name.partition('/')[2]}]" for name in names]
        lines.append("    end")
    lines += ["    platform --> workers --> routing"]
    for folder in sorted(graph):
        lines += [f"    {folder.replace('/', '_')} --> {name.replace('/', '_')}" for name in _direct(graph, folder)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(diagram())
