"""Lists of jobs while work runs: a job that changes its state during the search is listed and counted once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from celery_capacity.routing.inspect import job_list
from celery_capacity.routing.model.states import State
from tests.fixtures.processes.commanding import in_process
from tests.fixtures.stores.staged import Stage


@pytest.mark.parametrize(
    ("search", "words"), [("newest", ("jobs", "--json")), ("count", ("jobs", "--json", "--count", "--since", "1h"))]
)
def test_jobs_has_a_job_once_that_ends_during_the_search(
    stage: Stage,
    platform_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    search: str,
    words: tuple[str, ...],
) -> None:
    stage.worker("a", cpus=4000)
    job = stage.submit(cpus=1000)
    original = getattr(job_list._Search, search)

    def end_afterwards(self: Any, state: State, *limit: int) -> Any:
        answer = original(self, state, *limit)
        if state is State.ADMITTED:
            stage.end(job, "succeeded")
        return answer

    monkeypatch.setattr(job_list._Search, search, end_afterwards)
    answer = json.loads(in_process(platform_environment)(*words).stdout)
    assert answer == 1 if search == "count" else [line["id"] for line in answer] == [job]
