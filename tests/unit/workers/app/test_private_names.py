"""Private names of other libraries are listed, and are there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Final

import pytest

from celery_capacity.workers.app.private_names import PRIVATE_NAMES

ROOT: Final = Path(__file__).parents[4]
#: Private by their spelling alone: documented in the standard library or by SQLAlchemy.
PUBLIC: Final = frozenset({"_exit", "_mapping", "_replace", "_value_"})
#: Private names of the standard library, replaced in a process that gevent has patched.
STANDARD: Final = frozenset({"_PyRLock", "_active_limbo_lock", "_block", "_handlerList", "_lock", "_owner"})


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def trees() -> list[ast.Module]:
    files = [path for layer in ("platform", "workers", "routing") for path in (ROOT / layer).rglob("*.py")]
    return [ast.parse(path.read_text(encoding="utf-8")) for path in files]


def used_and_defined() -> tuple[set[str], set[str]]:
    """Return the private names that are used on other objects, and those that the platform defines."""
    used, defined = set[str](), set[str]()
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            (defined if owner in ("self", "cls") else used).add(node.attr)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            defined.add(node.name)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("celery_capacity"):
            used |= {alias.name for alias in node.names if is_private(alias.name)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            used |= {
                argument.value
                for argument in node.args[1:2]
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str) and is_private(argument.value)
            }
    return used, defined


def test_private_name_that_is_used_is_listed() -> None:
    used, defined = used_and_defined()
    listed = {name for names in PRIVATE_NAMES.values() for name in names}
    assert sorted(used - defined - listed - PUBLIC - STANDARD) == []
    # A name of the platform's own may be spelled as one of a library.
    assert sorted(name for name in listed if is_private(name) and name not in used | defined) == []


@pytest.mark.parametrize("module", PRIVATE_NAMES)
def test_private_name_is_there_in_the_installed_library(module: str) -> None:
    pytest.importorskip(module.partition(".")[0])
    library = importlib.import_module(module)
    source = inspect.getsource(library)
    missing = [name for name in PRIVATE_NAMES[module] if not re.search(rf"\b{name}\b", source)]
    assert [name for name in missing if not hasattr(library, name)] == []
