"""The short form of `make chaos`: random faults for half a minute, and all counts are 0."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import chaos
from tests.faults.plan import plan

SEED = 7
SECONDS = 30.0
JOBS = 1_000


@pytest.mark.long(45)
def test_half_a_minute_of_random_faults_costs_no_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    outcome = chaos.run(SEED, SECONDS, JOBS, plan(SEED, SECONDS), tmp_path, lines.append)
    chaos.show(outcome)
    shown = capsys.readouterr().out
    assert outcome.verdict.zeros, "\n".join([*lines, shown])
    assert outcome.accepted + outcome.refused >= JOBS
    assert outcome.to_json()["counts"] == dict.fromkeys(outcome.verdict.counts, 0)
    assert outcome.reservations > 0
    assert f"seed {SEED}" in shown
