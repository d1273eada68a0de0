"""The system user of the embedded Postgres, which root makes once."""

from __future__ import annotations

import os
import pwd
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from celery_capacity.platform.embedded import os_user

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
