"""`tenant` on a running platform: its words, its JSON, its refusals, and what the ledger has then."""

from __future__ import annotations

import json

import pytest

from celery_capacity.routing.ledger import keys
from tests.fixtures.documents.shapes import assert_shape
from tests.fixtures.processes.platforms import Platform


def test_tenant_commands_change_list_and_remove_a_rule(platform: Platform) -> None:
    platform.worker("a", cpus=2, pool="threads")
    made = platform.celery("tenant", "set", "physics", "--weight", "2", "--quota", "cpus=4", "--by", "ann", "--json")
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert_shape("tenant set", report)
    assert (report["before"], report["applied"], report["quota"]) == (False, True, {"cpus": 4})
    assert platform.redis.hgetall(keys.TENANTS) == {b"physics": b"2;;cpus=4000"}

    # A change keeps the other parts of the rule.
    words = platform.celery("tenant", "set", "physics", "--max-waiting", "7", "--nominal", "cpus=1.5")
    assert words.returncode == 0, words.stderr
    assert "tenant physics: weight 2, nominal 1.5 CPUs, quota 4 CPUs, at most 7 waiting jobs" in words.stdout
    assert "physics" in platform.celery("tenant", "list").stdout
    report = json.loads(platform.celery("tenant", "list", "--json").stdout)
    assert_shape("tenant list", report)
    assert [(line["name"], line["ruled"]) for line in report["tenants"]] == [("default", False), ("physics", True)]

    removed = platform.celery("tenant", "remove", "physics", "--json")
    assert removed.returncode == 0, removed.stderr
    report = json.loads(removed.stdout)
    assert_shape("tenant remove", report)
    assert (report["before"], report["ruled"]) == (True, False)
    assert platform.redis.hgetall(keys.TENANTS) == {}
    again = platform.celery("tenant", "remove", "physics")
    assert (again.returncode, "it had no rule" in again.stdout) == (1, True)


@pytest.mark.parametrize(
    ("name", "option", "value", "words"),
    [
        ("two words", "--weight", "2", "tenant"),
        ("physics", "--quota", "cpus", "such as cpus=16"),
        ("physics", "--quota", "queue:x=1", "such as cpus=16"),
        ("physics", "--max-waiting", "99999999999", "max_waiting 99999999999 is not valid"),
        ("default", "--max-waiting", "9", "PLATFORM_MAX_BACKLOG"),
    ],
)
def test_wrong_rule_is_refused(platform: Platform, name: str, option: str, value: str, words: str) -> None:
    refused = platform.celery("tenant", "set", name, option, value)
    assert refused.returncode != 0
    assert words in " ".join(refused.stderr.split())
    assert json.loads(platform.celery("tenant", "list", "--json").stdout)["tenants"][0]["ruled"] is False
