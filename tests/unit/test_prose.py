"""Prose that readers understand at the first reading: the rules that a program can check."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
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
#: Words that stood beside those of the glossary and of the field. For life it has incarnation, for pulse heartbeat, for
#: roster workers, for sight reachability, for seat position, for twin another incarnation, for box outbox.
REPLACED: Final = frozenset(
    {
        *("life", "lives", "pulse", "roster", "sight", "seat", "seats", "seated"),
        *("twin", "twins", "stranger", "strangers", "box", "here"),
    }
)
#: Whole names of values that say no more of them: a time-out, a position or an endpoint, a transition.
VAGUE: Final = frozenset({"within", "place", "places", "hand", "one"})
#: Layers whose names keep to the glossary.
KEPT_LAYERS: Final = ("platform", "routing", "workers")
#: Fields of the JSON of `celery -A platform job`, which keep their names.
FIELDS: Final = {("routing/inspect/explanation.py", "place"), ("platform/documents/reasons.py", "place")}
#: A parameter in a statement.
BOUND: Final = re.compile(r"(?<![:\w]):([a-z]\w*)")
#: Names that a line of Lua declares.
LUA_LOCAL: Final = re.compile(r"\blocal (?!function)([\w, ]+)")
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


@cache
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


def identifiers(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield the names that a file gives: line, name, and True for a value. False is for classes and functions."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.name, False
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg, True
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id, True
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr, True
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from ((node.lineno, name, True) for name in BOUND.findall(node.value))


def words(name: str) -> set[str]:
    return set(re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().split("_"))


def kept_files() -> Iterator[tuple[Path, str]]:
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(tuple(f"{layer}/" for layer in KEPT_LAYERS)):
            yield path, name


def test_docstring_opens_with_its_subject() -> None:
    assert lines_of(fault for fault in docstrings() if OPENING.match(fault[2])) == []


def test_comment_opens_with_its_subject() -> None:
    assert lines_of(fault for fault in comments() if OPENING.match(fault[2])) == []


def test_local_name_says_what_is_in_it() -> None:
    assert lines_of(fault for fault in local_names() if fault[2] in EMPTY) == []


def test_name_has_no_word_that_the_glossary_replaced() -> None:
    faults = ((path, line, name) for path, _ in kept_files() for line, name, _ in identifiers(path))
    assert lines_of(fault for fault in faults if words(fault[2]) & REPLACED) == []


def test_name_of_a_value_is_not_vague() -> None:
    faults = (
        (path, line, name)
        for path, file in kept_files()
        # The services of a worker are stopped `within` so many seconds.
        if not file.startswith("workers/")
        for line, name, is_value in identifiers(path)
        if is_value and name.strip("_").lower() in VAGUE and (file, name) not in FIELDS
    )
    assert lines_of(faults) == []


def test_constant_of_a_limit_begins_with_max() -> None:
    faults = (
        (path, line, name)
        for path in FILES
        if path.relative_to(ROOT).parts[0] in KEPT_LAYERS
        for line, name, _ in identifiers(path)
    )
    assert lines_of(fault for fault in faults if fault[2].strip("_").split("_")[0] == "MOST") == []


def test_log_message_has_no_word_that_the_glossary_replaced() -> None:
    faults = (
        (path, node.lineno, node.value)
        for path, _ in kept_files()
        for call in ast.walk(tree(path))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
        if isinstance(call.func.value, ast.Name) and call.func.value.id == "logger"
        for node in ast.walk(call)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    assert lines_of(fault for fault in faults if set(re.findall(r"[a-z]+", fault[2].lower())) & REPLACED) == []


def test_local_name_of_a_script_says_what_is_in_it() -> None:
    names = (
        (path, number, name)
        for path in sorted((ROOT / "routing" / "lua").rglob("*.lua"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for local in LUA_LOCAL.findall(line)
        for name in local.split(", ")
    )
    # The argument `told` is a field of the stream, which keeps its name.
    assert lines_of(fault for fault in names if fault[2] in EMPTY - {"told"}) == []


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
