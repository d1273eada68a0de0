"""The protocol's model: all of it is visited and nothing is wrong, and each rule is needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.fixtures.property_tests import LONG
from tests.model import exhausted
from tests.model.__main__ import main
from tests.model.bounds import USUAL, without
from tests.model.search import Found, search
from tests.model.state import Bounds, Faults, Rules

TWICE = "two starts of one attempt"
HEALTHY = "a healthy worker's job is taken back"
AGAIN = "a body starts though the end of its job is known"
SECOND = "a job that must not run again started twice"


@pytest.mark.long(40)
@pytest.mark.parametrize("bounds", USUAL, ids=lambda bounds: bounds.name)
def test_every_state_within_bounds_keeps_the_invariants(bounds: Bounds) -> None:
    """A search of many states is repeated once the model has changed, and in a long run."""
    sizes = exhausted.stored(bounds)
    if sizes is None or sizes[0] <= exhausted.FEW_STATES or LONG:
        result = search(bounds)
        assert result.violation == "", "\n".join([result.violation, *result.trace])
        assert sizes in (None, (result.states, result.steps)), "store the sizes anew: python -m tests.model --store"
        sizes = result.states, result.steps
    # The search did visit something: no step was lost by a mistake in its guard.
    assert sizes[0] > 10_000


def test_changed_model_is_searched_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in exhausted.FOLDER.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(exhausted, "FOLDER", tmp_path)
    monkeypatch.setattr(exhausted, "STORED", tmp_path / "exhausted.json")
    exhausted.store([Found(USUAL[0], Rules(), states=7, steps=8)])
    assert [exhausted.stored(bounds) for bounds in USUAL[:2]] == [(7, 8), None]
    for name in exhausted.BESIDE:
        (tmp_path / name).write_text("")
    assert exhausted.stored(USUAL[0]) == (7, 8)
    with (tmp_path / "books.py").open("a") as source:
        source.write("# another rule")
    assert exhausted.stored(USUAL[0]) is None


NEEDED = [
    (("tombstone_until_written",), 1, True, Faults(), TWICE),
    (("submit_deadline",), 1, True, Faults(), TWICE),
    (("claim_once",), 1, True, Faults(redelivery=1), TWICE),
    (("held_by_time", "renewal_exclusive"), 2, True, Faults(), HEALTHY),
    (("renewal_exclusive",), 1, True, Faults(pause=1), HEALTHY),
    (("fenced_wipe",), 1, True, Faults(restarted=1, silent_opener=1), TWICE),
    (("fenced_wipe",), 1, True, Faults(emptied=1, silent_opener=1), TWICE),
    (("stream_kept",), 1, False, Faults(restarted=1, crash=1), SECOND),
    (("rows_read_after",), 1, False, Faults(restarted=1, crash=1), SECOND),
    (("rows_read_after",), 1, True, Faults(restarted=1), AGAIN),
    (("rejoin_after_written",), 1, True, Faults(emptied=1), AGAIN),
    (("reports_first",), 1, True, Faults(emptied=1), AGAIN),
]


@pytest.mark.parametrize(("rules", "jobs", "rerun", "faults", "violation"), NEEDED)
def test_search_finds_a_counterexample_without_a_rule(
    rules: tuple[str, ...], jobs: int, rerun: bool, faults: Faults, violation: str
) -> None:
    bounds = Bounds("without a rule", jobs, rerun, faults)
    result = search(bounds, without(*rules))
    assert result.violation.startswith(violation)
    assert result.trace[-1].endswith(result.violation)
    assert result.trace[0].startswith("a job is accepted")
    # With the rule, there is no violation within the same bounds.
    assert search(bounds).violation == ""


def test_every_rule_is_shown_to_be_needed() -> None:
    assert {name for names, *_ in NEEDED for name in names} == set(Rules._fields)


def test_two_workers_and_two_jobs_without_faults_always_come_to_an_end() -> None:
    result = search(Bounds("no fault", 2, True, Faults()))
    assert (result.violation, result.trace) == ("", [])
    assert result.states == 5_117


def test_a_search_that_is_cut_off_says_so() -> None:
    assert search(USUAL[0], most=100).violation == "more than 100 states"


def test_program_prints_a_counterexample_and_fails_without_a_rule() -> None:
    done = CliRunner().invoke(main, ["--only", "a message comes twice", "--without", "claim_once", "--json"])
    assert done.exit_code == 1, done.output
    report = json.loads(done.stdout)
    assert report["violations"] == 1
    [run] = report["searches"]
    assert run["violation"].startswith(TWICE)
    assert run["steps_to_it"]
    assert run["without"] == ["claim_once"]


def test_program_lists_its_searches_for_people() -> None:
    done = CliRunner().invoke(main, ["--only", "a message comes twice"])
    assert done.exit_code == 0, done.output
    assert "a message comes twice" in done.stdout
    assert "nothing is wrong" in done.stdout


def test_program_refuses_a_rule_or_a_search_that_it_does_not_know() -> None:
    assert "no rule" in CliRunner().invoke(main, ["--without", "gravity"]).output
    assert "--store keeps" in CliRunner().invoke(main, ["--store", "--without", "claim_once"]).output
    assert "no search" in CliRunner().invoke(main, ["--only", "gravity"]).output
