"""The closing hints of the demo work in the shell that ran it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from celery_capacity.platform.commands.demo import next_steps


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "clone" / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "celery").write_text("#!/bin/sh\n", encoding="utf-8")
    (folder / "celery").chmod(0o755)
    monkeypatch.chdir(tmp_path / "clone")
    return folder


def programs_of(hints: str) -> set[str]:
    return set(re.findall(r"(\S*celery) -A platform", hints))


def test_hints_name_celery_alone_if_the_shell_has_it(programs: Path) -> None:
    assert programs_of(next_steps(programs, f"/usr/bin:{programs}")) == {"celery"}


def test_hints_name_the_path_if_make_ran_the_demo(programs: Path) -> None:
    assert programs_of(next_steps(programs, "/usr/bin")) == {".venv/bin/celery"}


def test_hints_name_the_path_if_another_celery_comes_first(programs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "celery").write_text("#!/bin/sh\n", encoding="utf-8")
    (other / "celery").chmod(0o755)
    assert programs_of(next_steps(programs, f"{other}:{programs}")) == {".venv/bin/celery"}


def test_hints_name_the_whole_path_from_another_folder(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert programs_of(next_steps(programs, "/usr/bin")) == {f"{programs}/celery"}
