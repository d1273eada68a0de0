"""The scripts are put together from the functions of the library that they use."""

from __future__ import annotations

import re

import pytest

from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.ledger import scripts
from celery_capacity.routing.ledger.client import Ledger
from tests.fixtures.processes import nursery
from tests.fixtures.servers.tenth import TENTH

TEXTS = {name: script.text for name, script in scripts.load(15_000, 60_000, max_ledger_backlog=0, flags=True).items()}


@pytest.mark.parametrize("name", scripts.names())
def test_script_makes_each_used_function_once_in_a_scope(name: str) -> None:
    used = scripts._used(scripts.body(name), scripts._functions())

    made = scopes(TEXTS[name])

    assert {scope[-1] for scope in made} == set(used)
    assert len(set(made)) == len(made)
    assert all(scope[-1] not in scope[:-1] for scope in made)


@pytest.mark.parametrize("name", scripts.names())
def test_function_stands_behind_those_that_it_calls(name: str) -> None:
    called = scripts._functions_called()
    made = scopes(TEXTS[name])

    for place, scope in enumerate(made):
        within = {inner[-1] for inner in made if inner[:-1] == scope}
        before = {other[-1] for other in made[:place] if other[:-1] == scope[: len(other) - 1]}
        assert called[scope[-1]] <= within | before, scope


def test_function_of_lazy_ones_alone_stands_inside_each() -> None:
    made = scopes(TEXTS["submit"])

    assert ("find_worker", "search") in made
    assert {scope for scope in made if scope[-1] == "bound_of"} == {
        ("find_worker", "bound_of"),
        ("passing_worker", "bound_of"),
    }
    # A function that the others use too stands before all.
    assert [scope for scope in made if scope[-1] == "amounts_of"] == [("amounts_of",)]


@pytest.mark.parametrize(("name", "once", "most"), [("submit", {"find_worker", "enter"}, 70), ("release", set(), 40)])
def test_usual_call_makes_few_functions(name: str, once: set[str], most: int) -> None:
    """The server makes the functions anew at every call. `once`: lazy functions that such a call reaches once."""
    made = [scope for scope in scopes(TEXTS[name]) if once.issuperset(scope[:-1])]

    assert len(made) <= most


def scopes(text: str) -> list[tuple[str, ...]]:
    """Return the functions of a script in their order, each behind the names of those that it stands inside."""
    made: list[tuple[str, ...]] = []
    around: list[str] = []
    for line in text.splitlines():
        if head := re.match(r"local function (\w+)\(", line):
            around.append(head[1])
            made.append(tuple(around))
        elif line == "end" and around:
            around.pop()
    return made


def test_no_parameter_has_the_name_of_a_function() -> None:
    """A parameter would hide that function from the functions that stand inside its function."""
    functions = scripts._functions()
    lists = (re.search(r"^local function \w+\((.*)\)", text, re.MULTILINE) for text in functions.values())

    parameters = {name for match in lists if match for name in re.findall(r"\w+", match.group(1))}

    assert parameters & set(functions) == set()


def test_lazy_functions_are_those_of_the_library() -> None:
    assert set(scripts._functions()) >= scripts.LAZY


def test_forked_processes_find_scripts_of_usual_intervals_ready() -> None:
    """A process that is forked for a test would put all of them together: a fifth of its cost."""
    nursery.put_scripts_together()
    made = scripts.load.cache_info().misses
    servers = {"REDIS_URL": "redis://127.0.0.1:1/0", "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}
    Ledger(Settings.from_environ({**TENTH, **servers})).client.close()
    assert scripts.load.cache_info().misses == made
