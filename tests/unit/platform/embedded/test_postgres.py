"""The embedded Postgres refuses a user without a name before anything is made."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from celery_capacity.platform.embedded import postgres, servers
from celery_capacity.platform.embedded.starting import CannotStart
from celery_capacity.routing.config.settings import Settings


@pytest.fixture
def nameless(monkeypatch: pytest.MonkeyPatch) -> int:
    """Be a user whom the system has no name for, as many a container's user, and return the number."""
    uid = max(entry.pw_uid for entry in pwd.getpwall()) + 1
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    return uid


def test_a_user_without_a_name_is_refused_with_advice(nameless: int, tmp_path: Path) -> None:
    with pytest.raises(CannotStart) as caught:
        postgres.check(tmp_path)
    assert f"the user {nameless}, who has no name" in caught.value.message
    assert f"useradd --uid {nameless}" in str(caught.value.advice)


def test_data_that_are_there_need_no_name(nameless: int, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    postgres.check(tmp_path)


def test_no_redis_is_started_for_a_user_without_a_name(nameless: int, tmp_path: Path) -> None:
    with pytest.raises(CannotStart):
        servers.ensure(Settings(home=tmp_path))
    assert not (tmp_path / "redis").exists()
