"""The tables of `workers`, `backlog` and `stats`, on a pipe and in a terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import click
import pytest
from rich.console import Console

from celery_capacity.platform.monitor import stats, tables, workers
from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers.client.cluster import Cluster
from celery_capacity.workers.process.exit_codes import Exit
from celery_capacity.workers.process.stores import Stores
from tests.fixtures.documents.shapes import assert_shape
from tests.fixtures.processes.commanding import Run, in_process
from tests.fixtures.stores.books import FOR_EVER
from tests.fixtures.stores.staged import Stage

NO_REDIS = "redis://127.0.0.1:1/0"
NO_POSTGRES = "postgresql://me:secret@127.0.0.1:1/platform"


@pytest.fixture
def platform_environment(platform_environment: dict[str, str]) -> dict[str, str]:
    """Return the usual variables with leases that outlast the test: nobody renews those of staged workers."""
    return {**platform_environment, "PLATFORM_WORKER_TTL": str(FOR_EVER), "PLATFORM_LOST_AFTER": str(FOR_EVER)}


@pytest.fixture
def stage(engine: Any, settings: Settings) -> Iterator[Stage]:
    """Yield a cluster with a full worker, an empty one, and jobs that wait, of which one can never run."""
    staged = Stage(engine, replace(settings, worker_ttl=60.0, lost_after=75.0))
    staged.worker("render-a", cpus=4000)
    staged.worker("render-b", cpus=2000)
    staged.end(_started(staged))
    staged.end(_started(staged), "failed")
    _started(staged)
    staged.submit(cpus=3000)
    staged.submit(cpus=9000)
    yield staged
    staged.close()


def _started(staged: Stage) -> str:
    job = staged.submit(cpus=4000)
    staged.start(job)
    return job


@pytest.fixture
def run(platform_environment: dict[str, str]) -> Run:
    return in_process(platform_environment)


def answer(run: Run, *words: str, **environment: str) -> Any:
    result = run(*words, "--json", **environment)
    assert result.exit_code == Exit.OK, result.output
    value = json.loads(result.stdout)
    assert_shape(words[0], value)
    return value


def terminal(width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, markup=False)


def test_workers_are_chosen_by_name_and_sorted(stage: Stage, run: Run) -> None:
    assert [worker["name"] for worker in answer(run, "workers", "--sort", "cpus")["workers"]] == [
        "render-a",
        "render-b",
    ]
    assert [worker["name"] for worker in answer(run, "workers", "render-b")["workers"]] == ["render-b"]
    assert answer(run, "workers", "video-*")["workers"] == []
    shown = run("workers", "*-b")
    assert shown.stdout.splitlines()[1].split()[:3] == ["render-b", "ready", "0/2"]
    assert "render-a" not in shown.stdout
    assert answer(run, "workers", "render-a", REDIS_URL=NO_REDIS)["source"] == "postgres"


def test_unknown_worker_is_refused_with_the_nearest(stage: Stage, run: Run) -> None:
    stage.sql("UPDATE workers SET name = 'render-gone' WHERE name = 'render-b'")
    for name, advice in {
        "rendera": "there is no worker rendera. The nearest: render-a",
        "render-gone": "worker render-gone is down. `celery -A platform jobs --worker render-gone` lists its jobs.",
    }.items():
        result = run("workers", name, "--json")
        assert result.exit_code == Exit.FAILED
        assert json.loads(result.stdout)["detail"].startswith(advice)
    assert "The nearest: render-a" in run("workers", "rendera", DATABASE_URL=NO_POSTGRES).stderr


def test_backlog_has_the_reason_of_each_group(stage: Stage, run: Run) -> None:
    seen = answer(run, "backlog")
    assert [(group["why"], group["blocked"]) for group in seen["groups"]] == [("too-large", True), ("no-room", False)]
    shown = run("backlog").stdout.splitlines()
    assert shown[0].split() == ["waiting", "task", "request", "oldest", "why"]
    assert "It is too large for every worker" in shown[1]
    console = terminal(100)
    tables.backlog(console, seen["groups"], seen["waiting"])
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 3
    assert "█" in lines[1]
    assert lines[1].rstrip().endswith("…")
    gone = run("backlog", "--json", DATABASE_URL=NO_POSTGRES)
    assert (gone.exit_code, json.loads(gone.stdout)["reference"]) == (Exit.UNAVAILABLE, "store-unavailable")


def test_stats_have_the_figures_of_a_task(stage: Stage, run: Run) -> None:
    (figures,) = answer(run, "stats", "--task", "ta*")["tasks"]
    counted = {name: figures[name] for name in ("jobs", "waiting", "running", "succeeded", "failed")}
    assert counted == {"jobs": 5, "waiting": 2, "running": 1, "succeeded": 1, "failed": 1}
    assert answer(run, "stats", "--task", "video.*")["tasks"] == []
    head, line = run("stats").stdout.splitlines()
    assert head.split()[-2:] == ["CPUs", "memory"]
    assert line.split()[-4:] == ["3", "to", "9", "-"]
    assert "50  " in line
    stage.sql("INSERT INTO declarations (name, request) VALUES ('other', '{}')")
    assert "None of the newest 20,000 jobs is of other." in run("stats", "--task", "other").stderr
    unknown = run("stats", "--task", "tusk", "--json")
    assert unknown.exit_code == Exit.FAILED
    assert json.loads(unknown.stdout)["advice"] == "The nearest: task."
    console = terminal(80)
    tables.statistics(console, {"tasks": [{**figures, "name": "a" * 80}], "sample": 5, "limit": 5})
    assert "…" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("width", "cpus", "memory", "words"),
    [
        (160, (0.5, 4), (0, 2**30), ["0.5 to 4", "- to 1 GiB"]),
        (160, (2, 2), (2**30, 2**30), ["   2   1 GiB"]),
        (80, (2, 2), (2**30, 2**30), []),
    ],
)
def test_stats_show_what_jobs_ask_for_where_there_is_room(
    width: int, cpus: Any, memory: Any, words: list[str], stage: Stage, run: Run
) -> None:
    (figures,) = answer(run, "stats")["tasks"]
    figures |= dict(zip(("cpus_least", "cpus_most", "memory_least", "memory_most"), (*cpus, *memory), strict=True))
    console = terminal(width)
    tables.statistics(console, {"tasks": [figures], "sample": 5, "limit": 10})
    head, line = console.file.getvalue().splitlines()[:2]  # type: ignore[attr-defined]
    assert ("CPUs" in head, "memory" in head) == (bool(words), bool(words))
    assert [word for word in words if word not in line] == []


def test_names_of_tasks_and_workers_are_completed(
    stage: Stage, platform_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in platform_environment.items():
        monkeypatch.setenv(name, value)

    def completed(command: click.Command, parameter: str, typed: str) -> list[str]:
        option = next(each for each in command.params if each.name == parameter)
        return [item.value for item in option.shell_complete(click.Context(command), typed)]

    assert sorted(completed(workers.command, "names", "render")) == ["render-a", "render-b"]
    assert completed(workers.command, "names", "render-a") == ["render-a"]
    assert completed(stats.command, "task", "t") == ["task"]
    monkeypatch.setenv("DATABASE_URL", NO_POSTGRES)
    assert completed(stats.command, "task", "t") == []


def test_backlog_is_chosen_by_task_queue_tenant_and_reason(stage: Stage, run: Run) -> None:
    stage.submit(cpus=3000, tenant="video")
    for words, requests in {
        ("--task", "t*k"): [3, 3, 9],
        ("--queue", "celery", "--reason", "no-room"): [3],
        ("--reason", "tenant-share"): [3],
        ("--queue", "c_lery"): [],
        ("--tenant", "video"): [3],
        ("--tenant", "default"): [3, 9],
        ("--reason", "too-large"): [9],
    }.items():
        groups = answer(run, "backlog", *words)["groups"]
        assert sorted(group["request"]["cpus"] for group in groups) == requests, words
    assert run("backlog", "--tenant", "vide").stdout == "no such job waits\n"
    refused = run("backlog", "--task", "tusk")
    assert refused.exit_code == Exit.FAILED
    assert "The nearest: task." in refused.stderr
    assert run("backlog", "--reason", "no-rum").exit_code == Exit.USAGE


def test_cluster_in_a_notebook_is_tables_without_markup(
    stage: Stage, platform_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.sql("UPDATE workers SET name = '<b>gone' WHERE name = 'render-b'")
    for name, value in platform_environment.items():
        monkeypatch.setenv(name, value)
    stores = Stores()
    shown = Cluster(stores)
    html = shown._repr_html_()
    for text in ("render-a", "4 of 6", "4 of 4", "9 CPUs"):
        assert text in html, html
    assert shown.info()["resources"]["waiting_jobs"] == 2
    monkeypatch.setenv("REDIS_URL", NO_REDIS)
    from_postgres = Cluster(Stores())._repr_html_()
    assert "&lt;b&gt;gone" in from_postgres
    assert "<b>" not in from_postgres
    monkeypatch.setenv("DATABASE_URL", NO_POSTGRES)
    assert Cluster(Stores())._repr_html_().startswith("<p><code>cluster</code>: ")
    stores.engine.dispose()
