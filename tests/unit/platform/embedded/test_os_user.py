"""The system user of the embedded Postgres, which root makes once."""

from __future__ import annotations

import os
import pwd
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from celery_capacity.platform.embedded import os_user
from celery_capacity.platform.embedded.starting import CannotStart

STARTS = 6


def test_starts_at_once_make_the_user_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight at once on a new machine, a quarter failed: a second `useradd` took the user away again."""
    making, overlap, made = (tmp_path / name for name in ("making", "overlap", "made"))
    program = f"mkdir {making} || touch {overlap}; sleep 0.2; touch {made}; rmdir {making}"
    entry = pwd.getpwuid(os.getuid())
    monkeypatch.setattr(os_user, "_MAKE_USER", (["sh", "-c", program],))
    monkeypatch.setattr(os_user, "_user", lambda: entry if made.exists() else None)
    monkeypatch.setattr(os_user, "SYSTEM_FOLDER", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with ThreadPoolExecutor(STARTS) as pool:
        owners = list(pool.map(lambda _: os_user.owner(), range(STARTS)))
    assert {owner.uid for owner in owners if owner is not None} == {entry.pw_uid}
    assert not overlap.exists()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the system's folder of a root without the user."""
    monkeypatch.setattr(os_user, "_user", lambda: None)
    monkeypatch.setattr(os_user, "SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.setattr(os_user, "USER_SECONDS", 1.0)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path


def test_refused_user_is_tried_a_few_times(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = root / "tries"
    monkeypatch.setattr(os_user, "_MAKE_USER", (["sh", "-c", f"echo >> {tries}; echo no room >&2; exit 1"],))
    with pytest.raises(CannotStart, match="no room") as refused:
        os_user.owner()
    assert "REDIS_URL" in refused.value.advice
    assert 2 <= len(tries.read_text()) <= 6


def test_starts_at_once_fail_at_once_where_user_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os_user, "_MAKE_USER", (["sh", "-c", "exit 1"],))

    def start(_: int) -> float:
        began = time.monotonic()
        with pytest.raises(CannotStart):
            os_user.owner()
        return time.monotonic() - began

    with ThreadPoolExecutor(STARTS) as pool:
        assert max(pool.map(start, range(STARTS))) < 3.0


def test_folder_that_cannot_be_made_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "file").touch()
    monkeypatch.setattr(os_user, "SYSTEM_FOLDER", root / "file" / "system")
    with pytest.raises(CannotStart, match="file/system") as refused:
        os_user.owner()
    assert not str(refused.value.value).startswith("PosixPath")
    assert "REDIS_URL" in refused.value.advice
