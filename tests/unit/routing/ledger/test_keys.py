"""Keys of Redis are built in one module, and nowhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from celery_capacity.routing.ledger import keys

ROOT: Final = Path(__file__).parents[4]
FILES: Final = sorted(
    path
    for layer in ("routing", "workers", "platform")
    for path in (ROOT / layer).rglob("*.py")
    if path != ROOT / "routing" / "ledger" / "keys.py"
)
#: A key, or the beginning or pattern of keys, without the words of a message.
KEY: Final = re.compile(r"(ledger|resource|worker):[\w:*]*")


def texts(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_module_of_keys_alone_names_keys() -> None:
    named = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in FILES
        for line, text in texts(path)
        if KEY.fullmatch(text)
    ]
    assert named == []


def test_script_names_keys_by_the_module() -> None:
    code = {
        path.name: re.sub(r"--[^\n]*", "", path.read_text(encoding="utf-8"))
        for path in (ROOT / "routing" / "lua").rglob("*.lua")
    }
    assert [name for name, text in code.items() if re.search(r"['\"](ledger|resource|worker):", text)] == []


@pytest.mark.parametrize("build", [keys.book, keys.held, keys.missing, keys.view])
def test_key_of_a_worker_is_refused_for_a_wrong_name(build: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match="name"):
        build("a b\n")
