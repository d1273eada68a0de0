"""Results of an action on many jobs: a line each on a terminal, else a bar beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from celery_capacity.platform.actions import choosing
from celery_capacity.workers.display import progress_bar


@dataclass(frozen=True)
class Done:
    """Result for a job."""

    job: str

    def to_json(self) -> dict[str, Any]:
        return {"id": self.job}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw bars at once, as on a terminal."""
    monkeypatch.setattr(progress_bar, "AFTER", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")


def reported(capsys: pytest.CaptureFixture[str], as_json: bool) -> tuple[str, str]:
    choosing.report([Done("a"), Done("b")], lambda _: "done", as_json, 2)
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_bar_counts_results_whose_lines_come_later(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = reported(capsys, as_json=True)
    assert json.loads(out) == [{"id": "a"}, {"id": "b"}]
    assert "2/2" in err


def test_lines_on_a_terminal_have_no_bar_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = reported(capsys, as_json=False)
    assert out.splitlines() == ["a  done", "b  done"]
    assert err == ""


def test_nothing_is_drawn_off_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR")
    assert reported(capsys, as_json=False) == ("a  done\nb  done\n", "")
