"""An installation without extras is enough: all modules that ours load are asked for.

We ask for them, or a distribution that we ask for does. The environment of the tests has more.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Loads the modules of a submitter, of a worker on Redis and of the commands, where certain modules are missing.
LOADED = """
import importlib.abc, sys
missing = set(sys.argv[1:])

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import celery_capacity.workers.plugin
from celery_capacity import create_app, fenced
import kombu.transport.redis, celery.backends.redis
from celery_capacity.platform.actions import cancel, retry, submit, wait
from celery_capacity.platform.commands import cluster, dashboard, db, job, jobs, reconcile, verify
from celery_capacity.platform.web import application
"""


#: Distributions that ours can do without: redis-py then reads replies in Python.
OPTIONAL = {"hiredis"}


def name_of(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def asked_for(name: str, seen: set[str], extras: Collection[str] = ()) -> set[str]:
    """Return a distribution and all that comes with it when these of its extras are asked for."""
    if name in seen:
        return seen
    seen.add(name)
    try:
        wanted = requires(name) or []
    except PackageNotFoundError:
        return seen  # asked for on another system only
    for requirement in wanted:
        extra = re.search(r"""extra == ["']([\w-]+)""", requirement)
        if extra is None or extra[1] in extras:
            asked_for(name_of(requirement), seen, extras_of(requirement))
    return seen


def extras_of(requirement: str) -> list[str]:
    """Return the extras that a requirement names in brackets."""
    match = re.match(r"[\w.-]+\[([\w,-]+)\]", requirement)
    return match[1].split(",") if match else []


def our_requirements() -> list[str]:
    """Return the requirements of setup.cfg itself: the metadata of the installed package may be older."""
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    block = re.search(r"^install_requires =\n((?: .*\n)+)", text, re.MULTILINE)
    assert block is not None
    return [line.strip() for line in block[1].splitlines()]


@pytest.mark.parametrize("without", [set(), OPTIONAL], ids=["all that is asked for", "less what is optional"])
def test_nothing_is_loaded_that_nobody_asked_for(without: set[str]) -> None:
    asked: set[str] = {"celery-capacity"}
    for requirement in our_requirements():
        asked_for(name_of(requirement), asked, extras_of(requirement))
    assert asked >= OPTIONAL
    asked -= without
    sources = packages_distributions()
    missing = [module for module, names in sources.items() if not asked & {name_of(name) for name in names}]
    assert {"pytest", "ruff"} <= set(missing)
    command = [sys.executable, "-c", LOADED, *missing]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
