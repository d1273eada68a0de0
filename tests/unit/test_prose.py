"""Prose that readers understand at the first reading: the rules that a program can check."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
FILES: Final = sorted(
    path
    for folder in ("benchmarks", "docs", "examples", "migrations", "platform", "routing", "tests", "workers")
    for path in (ROOT / folder).rglob("*.py")
)
#: A docstring or comment opens with its subject.
OPENING: Final = re.compile(r"(What|Whether|Whoever|The same|As above|One|All of these)\b|\(")
#: Names that say nothing of a value.
EMPTY: Final = frozenset({"found", "one", "known", "said", "own", "given", "told"})
#: Characters of the name of a test: `test_<subject>_<expected>_<condition>`.
TEST_NAME_LENGTH: Final = 70
#: The newest commits, and characters of their subjects.
COMMITS: Final = 50
SUBJECT_LENGTH: Final = 60
SUBJECT: Final = re.compile(r"[a-z][\w/. -]*(, [a-z][\w/. -]*)*: [a-z]")
DOCUMENTED: Final = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def lines_of(faults: Iterator[tuple[Path, int, str]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line}: {text[:70]}" for path, line, text in faults]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def docstrings() -> Iterator[tuple[Path, int, str]]:
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
                yield path, getattr(node, "lineno", 1), text


def comments() -> Iterator[tuple[Path, int, str]]:
    for path in FILES:
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type == tokenize.COMMENT:
                yield path, token.start[0], token.string.lstrip("#: ")


def local_names() -> Iterator[tuple[Path, int, str]]:
    """Yield the names that functions store, but for their parameters."""
    for path in FILES:
        for function in ast.walk(tree(path)):
            if isinstance(function, FUNCTIONS):
                parameters = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
                for node in ast.walk(function):
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id not in parameters:
                        yield path, node.lineno, node.id


def test_docstring_opens_with_its_subject() -> None:
    assert lines_of(fault for fault in docstrings() if OPENING.match(fault[2])) == []


def test_comment_opens_with_its_subject() -> None:
    assert lines_of(fault for fault in comments() if OPENING.match(fault[2])) == []


def test_local_name_says_what_is_in_it() -> None:
    assert lines_of(fault for fault in local_names() if fault[2] in EMPTY) == []


def test_name_of_a_test_is_read_at_a_glance() -> None:
    names = (
        (path, node.lineno, node.name)
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    )
    assert lines_of(fault for fault in names if len(fault[2]) > TEST_NAME_LENGTH) == []


def test_subject_of_a_commit_names_its_area_and_is_short() -> None:
    try:
        log = subprocess.run(
            ["git", "log", "--no-merges", f"-{COMMITS}", "--format=%s"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no clone")
    subjects = log.stdout.splitlines()
    assert [line for line in subjects if len(line) > SUBJECT_LENGTH or not SUBJECT.match(line)] == []
