"""JSON Schemas of what the commands print, made from the models in `platform/documents`.

`make reference` writes them to `docs/reference/schemas`. A test compares the files with the models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, Final

from celery_capacity.platform.documents.printed import ERROR_TITLE, PRINTED, schema_of
from celery_capacity.platform.web.pages.api_reference import type_of

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


def _written(schema: dict[str, Any]) -> str:
    """Return the type of a value in Markdown, with links to the objects of the page."""
    words = type_of(schema)
    return "".join(word.text if word.object is None else f"[{word.text}](#{word.text.lower()})" for word in words)


def _fields(schema: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the name, the type and the meaning of each field of an object."""
    required = schema.get("required", ())
    for name, member in schema.get("properties", {}).items():
        missing = "" if name in required else "; may be missing"
        yield f"`{name}`", f"{_written(member)}{missing}", member.get("description", "")
    others = schema.get("additionalProperties")
    if isinstance(others, dict):
        yield "other names", _written(others), others.get("description", "")


def documents() -> Iterator[tuple[str, str, str]]:
    """Yield what prints each document, its type, and what it is."""
    for name in sorted(PRINTED):
        schema = schema_of(name)
        model = PRINTED[name].model.__name__
        kind = f"[{model}](#{model.lower()})" if "properties" in schema else _written(schema)
        yield f"`{PRINTED[name].call}`", kind, " ".join(schema["description"].split())
    yield "any command", "[PrintedError](#printederror)", f"{schema_of('error')['description']} It is {ERROR_TITLE}."


def objects() -> Iterator[tuple[str, str, list[tuple[str, str, str]]]]:
    """Yield the name, the meaning and the fields of each object, by name; of a word, its values as the meaning."""
    load_platform()
    by_name: dict[str, dict[str, Any]] = {}
    for name in sorted({*PRINTED, "error"}):
        schema = schema_of(name)
        by_name |= schema.get("$defs", {})
        if "properties" in schema:
            by_name["PrintedError" if name == "error" else PRINTED[name].model.__name__] = schema
    for name, schema in sorted(by_name.items()):
        text = " ".join(schema.get("description", "").split())
        values = f" {_written(schema)}" if "enum" in schema else ""
        yield name, f"{text}{values}", list(_fields(schema))
