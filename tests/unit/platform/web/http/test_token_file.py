"""The token that the first start makes: kept for the next one, and read by its user alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from celery_capacity.platform.web.http.token_file import NAME, read_or_make


def test_token_is_made_once_and_private(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    made = read_or_make(home)
    assert made is not None
    token, path, is_new = made
    assert (path, is_new, path.stat().st_mode & 0o777) == (home / NAME, True, 0o600)
    assert len(token) >= 32
    assert read_or_make(home) == (token, path, False)
    assert list(home.iterdir()) == [path]


def test_dashboards_that_start_at_once_have_one_token(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def make(_number: int) -> tuple[str, Path, bool] | None:
        start.wait()
        return read_or_make(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        made = [result for result in pool.map(make, range(8)) if result is not None]
    assert {token for token, _, _ in made} == {(tmp_path / NAME).read_text(encoding="ascii").strip()}
    assert sorted(is_new for _, _, is_new in made) == [False] * 7 + [True]


def test_token_that_others_may_read_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_text("0123456789abcdef0123456789abcdef\n", encoding="ascii")
    path.chmod(0o644)
    made = read_or_make(tmp_path)
    assert made is not None
    assert (made[0] != "0123456789abcdef0123456789abcdef", path.stat().st_mode & 0o777) == (True, 0o600)


def test_folder_that_cannot_be_written_gives_no_token(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert read_or_make(file / "home") is None
