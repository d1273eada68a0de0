"""Requests for tasks whose code nobody changes: Celery's `task_annotations`, and the file of `PLATFORM_REQUESTS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Engine

from celery_capacity import SettingsError, create_app
from celery_capacity.routing.config import task_rules
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.model.request import Request
from celery_capacity.workers.process.stores import platform_of
from tests.fixtures.jobs.submitting import Submitter
from tests.fixtures.processes.platforms import Platform
from tests.tasks import declared

Write = Callable[[str], Path]

#: Rules for tests.tasks.declared: four() declares 4 CPUs, four_and_two() declares 2 GiB as well.
FILE = """
["tests.tasks.declared.four_and_two"]
memory = "1GiB"
rerun = false

["tests.tasks.declared.four*"]
cpus = 0.5

["*.nothing"]
cpus = 3
resources = { licence = 2 }
"""

LIBRARY = """
from celery import shared_task

@shared_task(cpus=8)
def eight(): ...

@shared_task(cpus=4)
def four(): ...
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "requests.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# -- the file alone


def test_first_fitting_pattern_counts_and_keeps_what_it_does_not_name(write: Write) -> None:
    rules = task_rules.read(write(FILE))
    four = Request.from_options({"cpus": 4, "memory": "2GiB"}, 1000)
    name = "tests.tasks.declared."
    assert rules.over(name + "four_and_two", four).to_people() == {"cpus": 4, "memory": 1024**3, "slots": 1}
    assert rules.over(name + "four", four).to_people() == {"cpus": 0.5, "memory": 2 * 1024**3, "slots": 1}
    assert rules.over("other", four) is four
    assert rules.of("other") is None
    assert (rules.rules[0].rerun, rules.rules[1].rerun) == (False, None)


def test_all_that_is_wrong_in_it_is_told_at_once_with_table_and_key(write: Write) -> None:
    path = write('["a"]\ncpus = -1\n["b"]\nmemmory = 5\nrerun = 1\n["c.*"]\nmemory = "lots"\n')
    with pytest.raises(SettingsError) as wrong:
        task_rules.read(path)
    first, second, third, fourth = wrong.value.problems
    assert all(problem.startswith(f"PLATFORM_REQUESTS={path}, [") for problem in wrong.value.problems)
    assert "['a']: cpus" in first
    keys = ", ".join(task_rules.KEYS)
    assert f"['b']: 'memmory' is not known; there are {keys}." in second
    assert {"cpus", "memory", "gpus", "resources", "expected", "where", "rerun"} <= set(task_rules.KEYS)
    assert "['b']: rerun = 1 must be true or false" in third
    assert "['c.*']: memory" in fourth


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[reports]\ncpus =\n", "is not TOML: Invalid value (at line 2, column 7)"),
        ("cpus = 4\n", "['cpus']: it must be a table"),
        ("[reports.nightly]\ncpus = 4\n", 'written between quotes: ["reports.nightly"]'),
    ],
)
def test_what_is_no_table_of_tasks_says_where(write: Write, text: str, says: str) -> None:
    with pytest.raises(SettingsError) as wrong:
        task_rules.read(write(text))
    assert says in str(wrong.value)


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"PLATFORM_REQUESTS=.*nowhere\.toml cannot be read: .*No such file"):
        task_rules.read(tmp_path / "nowhere.toml")


def test_many_names_are_not_all_remembered(write: Write) -> None:
    rules = task_rules.read(write(FILE))
    for number in range(2 * task_rules.MAX_NAMES):
        assert rules.of(f"{number}.nothing") is rules.rules[2]
    assert len(rules._found) <= task_rules.MAX_NAMES


# -- what is sent


@contextmanager
def submitting(environment: dict[str, str], **options: Any) -> Iterator[Celery]:
    app = create_app("annotated", resolve=lambda _: Settings.from_environ(environment), **options)
    app.loader.import_task_module(declared.__name__)
    yield app
    app.close()
    stores = platform_of(app)
    stores.sending.close()
    stores.engine.dispose()
    stores.redis.close()


@pytest.fixture(autouse=True)
def no_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "REDIS_URL", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)


def sent(engine: Engine, app: Celery, of: str, **options: Any) -> dict[str, Any]:
    """Return the request of a new job of tests.tasks.declared, and its permission to run again."""
    job = app.tasks[f"{declared.__name__}.{of}"].apply_async(**options).id
    with engine.connect() as connection:
        row = connection.exec_driver_sql("SELECT request, rerun FROM jobs WHERE id = %s", (job,)).one()
    return {**row.request, "rerun": row.rerun}


def test_annotations_give_requests_as_they_give_all_else(platform_environment: dict[str, str], engine: Engine) -> None:
    annotations = {f"{declared.__name__}.four_and_two": {"cpus": 2, "rerun": False}}
    with submitting(platform_environment, task_annotations=annotations) as app:
        asked = sent(engine, app, "four_and_two")
        assert asked == {"cpus": 2, "memory": 2 * 1024**3, "slots": 1, "rerun": False}
        assert sent(engine, app, "four") == {"cpus": 4, "slots": 1, "rerun": True}


def test_call_wins_over_file_and_file_over_annotations_and_code(
    platform_environment: dict[str, str], engine: Engine, write: Write
) -> None:
    environment = {**platform_environment, "PLATFORM_REQUESTS": str(write(FILE))}
    annotations = {f"{declared.__name__}.four": {"cpus": 2, "memory": "1MiB"}}
    with submitting(environment, task_annotations=annotations) as app:
        assert sent(engine, app, "four") == {"cpus": 0.5, "memory": 1024**2, "slots": 1, "rerun": True}
        assert sent(engine, app, "four", cpus=1.5)["cpus"] == 1.5
        assert sent(engine, app, "four_and_two") == {"cpus": 4, "memory": 1024**3, "slots": 1, "rerun": False}
        assert sent(engine, app, "four_and_two", rerun=True)["rerun"] is True
        assert sent(engine, app, "nothing") == {"cpus": 3, "licence": 2, "slots": 1, "rerun": True}
        assert sent(engine, app, "three_again")["cpus"] == 3


def test_worker_publishes_its_file_and_does_not_start_with_a_wrong_one(
    platform: Platform, submitter: Submitter, write: Write
) -> None:
    wrong = platform.start("wrong", "worker", PLATFORM_REQUESTS=str(write("[a]\ncpu = 1\n")))
    assert wrong.wait() == 78
    assert "['a']: 'cpu' is not known" in wrong.tail()
    # This process does not import the module.
    (platform.folder / "library.py").write_text(LIBRARY, encoding="utf-8")
    rules = '["library.*t"]\ncpus = 0.5\n["library.eight"]\ncpus = 0.25\nmemory = "1MiB"\n'
    platform.worker("w", pool="threads", PLATFORM_REQUESTS=str(write(rules)), PLATFORM_IMPORTS="library")
    for name, request in {
        "library.eight": {"cpus": 0.5, "slots": 1},
        "library.four": {"cpus": 4, "slots": 1},
    }.items():
        job = submitter.send(name)
        assert submitter.ended(job).state == "succeeded"
        assert submitter.row(job).request == request
