"""`settings` finds the mistakes for which a worker would refuse its settings."""

from __future__ import annotations

import json

import pytest

from celery_capacity.workers.process.exit_codes import Exit
from tests.fixtures.processes.commanding import in_process

AWAY = {"REDIS_URL": "redis://127.0.0.1:1/0", "DATABASE_URL": "postgresql://me@127.0.0.1:1/platform"}


@pytest.mark.parametrize(
    ("name", "value", "line", "says"),
    [
        ("PLATFORM_STORE_TIMEOUT", "0", "PLATFORM_STORE_TIMEOUT", "must be from 0.001"),
        ("PLATFORM_WORKER_TTL", "5", "PLATFORM_RENEW_INTERVAL", "must be below PLATFORM_WORKER_TTL=5"),
    ],
)
def test_settings_that_contradict_are_told_at_a_line(name: str, value: str, line: str, says: str) -> None:
    run = in_process(AWAY)
    result = run("settings", "--set", "--json", **{name: value})
    assert result.exit_code == Exit.FAILED
    problems = {of["name"]: of["problem"] for of in json.loads(result.stdout) if of["problem"]}
    assert list(problems) == [line]
    assert says in problems[line]
    shown = run("settings", "--set", **{name: value})
    assert (shown.exit_code, says in shown.stdout) == (Exit.FAILED, True)


def test_settings_warns_of_an_unknown_name_beside_a_wrong_value() -> None:
    run = in_process({**AWAY, "PLATFORM_WORKR_TTL": "60"})
    result = run("settings", "--set")
    assert result.exit_code == Exit.OK
    assert result.stderr.startswith("Warning: PLATFORM_WORKR_TTL is not a setting")
    wrong = run("settings", PLATFORM_CPUS="many")
    assert wrong.exit_code == Exit.FAILED
    assert result.stderr == wrong.stderr
    assert wrong.stdout.count("wrong: ") == 1
