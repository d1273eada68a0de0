"""JSON Schemas of what the commands print, made from the models in `platform/documents`.

`make reference` writes them to `docs/reference/schemas`. A test compares the files with the models.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Final

from celery_capacity.platform.documents.printed import PRINTED, schema_of

FOLDER: Final = Path(__file__).resolve().parents[1] / "reference" / "schemas"


def load_platform() -> None:
    """Import all modules of the platform, so that each error that it may raise is known."""
    package = import_module("celery_capacity.platform")
    for module in walk_packages(package.__path__, f"{package.__name__}."):
        import_module(module.name)


def files() -> dict[str, str]:
    """Return the text of each schema by the name of its file."""
    load_platform()
    return {
        f"{name}.json": json.dumps(schema_of(name), indent=2, ensure_ascii=False) + "\n"
        for name in sorted({*PRINTED, "error"})
    }


def write(folder: Path = FOLDER) -> list[str]:
    """Write the schemas, delete those of no command, and return the names of the files that changed."""
    wanted = files()
    before = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    for name in before.keys() - wanted.keys():
        (folder / name).unlink()
    for name, text in wanted.items():
        if before.get(name) != text:
            (folder / name).write_text(text, encoding="utf-8")
    return sorted(name for name in {*before, *wanted} if before.get(name) != wanted.get(name))
