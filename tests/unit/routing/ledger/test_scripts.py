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
def test_script_makes_each_used_function_once(name: str) -> None:
    used = scripts._used(scripts.body(name), scripts._functions())

    made = re.findall(r"^local function (\w+)\(", TEXTS[name], re.MULTILINE)

    assert sorted(made) == sorted(used)


def test_function_stands_inside_its_only_user_that_is_lazy() -> None:
    lines = TEXTS["submit"].splitlines()
    begin = lines.index(next(line for line in lines if line.startswith("local function find_worker(")))
    end = lines.index("local function admit_or_file(id, job, rerun, facts, now, batch)")

    assert any(line.startswith("local function search(") for line in lines[begin + 1 : end])
    # A function with another user stands before both.
    assert any(line.startswith("local function bound_of(") for line in lines[:end])


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
