"""The scripts and the statements make no edge beside the table of transitions."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Final

import pytest

from celery_capacity.routing import insert, inspect, recovery, store
from celery_capacity.routing.insert import successors
from celery_capacity.routing.ledger import scripts
from celery_capacity.routing.model.amounts import DEFAULT_QUEUE
from celery_capacity.routing.model.states import FINAL, TRANSITIONS, Event, State, Step
from celery_capacity.routing.recovery import rebuild, reconcile
from celery_capacity.routing.store import backlog, fencing, job_transitions
from celery_capacity.workers import results

NAMES: Final = scripts.names()
HELD: Final = (State.ADMITTED, State.RUNNING)

#: Each `note` in the Lua, as (script or function of the library, state, step) -> the edges it makes.
NOTES: Final[dict[tuple[str, str, str], list[tuple[State, Event]]]] = {
    # submit admits a row as it comes; fill, place and the scripts that fill admit waiting jobs.
    ("note_admission", "'admitted'", "STEP.admitted"): [
        (state, Event.ADMIT) for state in (State.ACCEPTED, State.SCHEDULED, State.WAITING)
    ],
    # admitted and claimed in one step
    ("hand_over", "'running'", "STEP.running"): [(State.WAITING, Event.ADMIT), (State.ADMITTED, Event.CLAIM)],
    ("claim", "'running'", "STEP.running"): [(State.ADMITTED, Event.CLAIM)],
    ("admit_or_file", "'waiting'", "STEP.filed"): [(State.ACCEPTED, Event.FILE), (State.SCHEDULED, Event.FILE)],
    ("put_back", "'waiting'", "STEP.back"): [
        (state, event) for state in HELD for event in (Event.HAND_BACK, Event.TAKE_BACK)
    ],
    ("put_back", "'lost'", "STEP.ended"): [(state, Event.LOSE) for state in HELD],
    # a job that was revoked while it was held
    ("put_back", "'cancelled'", "STEP.back"): [(state, Event.CANCEL) for state in HELD],
    # `scheduled` where a successor runs next, else `accepted`
    ("put_back", "state", "STEP.back"): [
        (state, event) for state in HELD for event in (Event.RETRY_LATER, Event.RESUBMIT)
    ],
    # the outcome, or `scheduled` of a job that is retried or put back
    ("release", "state", "final and STEP.ended or STEP.back"): [
        (state, event)
        for state in HELD
        for event in (
            Event.SUCCEED,
            Event.FAIL,
            Event.CANCEL,
            Event.EXPIRE,
            Event.REPLACE,
            Event.RETRY_LATER,
            Event.REQUEUE,
        )
    ],
    ("cancel", "state", "STEP.dropped"): [(State.WAITING, event) for event in (Event.CANCEL, Event.EXPIRE, Event.FAIL)],
}


def notes() -> set[tuple[str, str, str]]:
    """Return the calls of `note`: where, with which state and which step."""
    texts = {**scripts._functions(), **{name: scripts.source(name) for name in NAMES}}
    texts.pop("note")
    return {
        (name, state.strip(), step.strip())
        for name, text in texts.items()
        for state, step in re.findall(r"\bnote\(\w+, job, ([^,]+), ([^,]+), now", text)
    }


def test_every_transition_that_a_script_notes_is_in_the_table_of_the_test() -> None:
    assert notes() == NOTES.keys()
    count = sum(len(re.findall(r"(?<!function )\bnote\(", text)) for text in [
        *scripts._functions().values(), *(scripts.source(name) for name in NAMES)])  # fmt: skip
    assert count == len(NOTES)


@pytest.mark.parametrize(("note", "edges"), NOTES.items(), ids=str)
def test_every_edge_that_a_script_makes_is_in_the_table_of_transitions(
    note: tuple[str, str, str], edges: list[tuple[State, Event]]
) -> None:
    assert [edge for edge in edges if edge not in TRANSITIONS] == []
    targets = {TRANSITIONS[edge] for edge in edges}
    if note[1].startswith("'"):
        assert State(note[1].strip("'")) in targets
    for step in re.findall(r"STEP\.(\w+)", note[2]):
        assert step.upper() in Step.__members__


def test_every_final_outcome_that_a_worker_reports_is_a_state() -> None:
    listed = re.search(r"outcome \(([^)]*)\)", scripts.header("release")["ARGV"])
    assert listed is not None
    outcomes = set(listed.group(1).split(", "))
    assert {State(name) for name in outcomes - {"retried", "requeued", "handed_back"}} == {*FINAL, State.REPLACED}


#: Words in quotes in the Lua that are states of a job in Redis, or of a worker's book.
CARD_STATES: Final = {*(state.value for state in State), "ended"}
STATUSES: Final = {"ready", "draining", "closed"}


def test_every_state_that_the_lua_compares_or_writes_is_known() -> None:
    for name, text in {**scripts._functions(), **{name: scripts.source(name) for name in NAMES}}.items():
        code = re.sub(r"--[^\n]*", "", text)
        for word in re.findall(
            r"\bstate [=~]= '(\w+)'|(?<!verdict, )\bstate = '(\w+)'|'state', '(\w+)', 'epoch'", code
        ):
            assert set(word) - {""} <= CARD_STATES, name
        for word in re.findall(r"\bstatus [=~]=? ?'(\w+)'|'status', '(\w+)'", code):
            assert set(word) - {""} <= STATUSES, name


#: Statement -> the edges that it makes by itself, whatever the entry says.
STATEMENTS: Final = {
    "store._DROP": [
        (state, event)
        for state in (State.ACCEPTED, State.SCHEDULED, State.REPLACED)
        for event in (Event.CANCEL, Event.EXPIRE)
    ]
    + [(State.ACCEPTED, Event.FAIL)],
    # an attempt that ended while its row holds a successor, or that was revoked meanwhile and would go on
    "store._APPLY": [(state, event) for state in HELD for event in (Event.RETRY_LATER, Event.CANCEL)],
    # by an attempt that runs, though its row may be behind
    "fence._COMMIT": [(state, Event.SUCCEED) for state in HELD],
}


@pytest.mark.parametrize(("statement", "edges"), STATEMENTS.items(), ids=str)
def test_every_edge_that_a_statement_makes_is_in_the_table_of_transitions(
    statement: str, edges: list[tuple[State, Event]]
) -> None:
    assert [edge for edge in edges if edge not in TRANSITIONS] == []


def test_the_statements_use_only_states_of_the_table() -> None:
    # and statuses of workers, outcomes of attempts, who decides, and the default queue
    allowed = {state.value for state in State} | {"ready", "draining", "taken_back", "postgres", DEFAULT_QUEUE, ""}
    # fields of a progress
    allowed |= {"epoch", "attempt"}
    for module in (job_transitions, rebuild, reconcile, fencing):
        for name, statement in vars(module).items():
            if not hasattr(statement, "bindparams"):
                continue
            for word in re.findall(r"'(\w*)'", str(statement)):
                assert word in allowed, f"{module.__name__}.{name}"


def test_the_statement_that_drops_a_job_guards_the_states_it_leaves() -> None:
    guard = re.search(r"state IN \(([^)]*)\)", str(backlog._DROP))
    assert guard is not None
    states = {State(word) for word in re.findall(r"'(\w+)'", guard.group(1))}
    assert states == {state for state, _ in STATEMENTS["store._DROP"]}


def test_no_statement_leaves_a_final_state() -> None:
    final = ", ".join(f"'{state.value}'" for state in sorted(FINAL))
    assert f"jobs.state NOT IN ({final})" in str(job_transitions._APPLY.plain)
    assert f"state NOT IN ({final})" in str(successors._SUCCESSOR)


#: A condition on the state of a row, which keeps a write from a row that went on.
OF_STATE: Final = re.compile(r"\b(state|step) (=|<|IN|NOT IN)|\b(finished_at|ended_at) IS NULL")
#: A condition on the token of an attempt: (epoch, attempt), or (epoch, attempt, step).
OF_TOKEN: Final = re.compile(
    r"epoch, (\w+\.)?attempt(, [^)]*)?\)\s*<|epoch = :epoch AND attempt = :attempt|attempt <= CAST\(:publisher"
)
#: Writes of jobs and attempts that are guarded by the state alone, and why no attempt writes them.
BY_STATE: Final = {
    "backlog._MARK": "a job that has not started, and stays in Postgres",
    "backlog._FETCH": "a job that has not started, and leaves Postgres",
    "claims._TAKE_ANY": "it makes the attempt",
    "claims._TAKE_BESIDE": "it makes the attempt",
    "controls._SET": "the priority of a job, which an operator sets",
    "dependencies._OPEN": "a job that waits for others",
    "fencing._GIVE_UP": "all attempts of an incarnation",
    "fencing._GIVE_UP_FREE": "all attempts of an incarnation",
    "backlog._DROP": "a job that is not in the ledger",
    "replacements._END": "a job whose attempt has ended by a replacement",
    "revocation._MARK": "a mark on a job that may be held by any attempt",
}
#: Writes of the outbox of an ended job, guarded by the outbox that was read.
BY_OUTBOX: Final = {"deliver_later._DONE", "deliver_later._ALL_DONE"}


def writes() -> Iterator[tuple[str, str]]:
    """Yield the statements that change jobs or attempts: name, and all that follows its first WHERE."""
    for package in (insert, store, recovery, inspect, results):
        for listed in pkgutil.iter_modules(package.__path__):
            module = import_module(f"{package.__name__}.{listed.name}")
            for name, value in vars(module).items():
                plain: Any = getattr(value, "plain", value)
                if not isinstance(value, type) and hasattr(plain, "bindparams"):
                    text = str(plain)
                    if re.search(r"\b(UPDATE|DELETE FROM) (jobs|attempts)\b", text):
                        yield f"{listed.name}.{name}", text[text.index("WHERE") :]


def test_every_write_of_a_job_is_guarded_by_its_state() -> None:
    unguarded = {name for name, condition in writes() if not OF_STATE.search(condition)}
    assert unguarded == BY_OUTBOX


def test_every_write_of_an_attempt_is_guarded_by_its_token() -> None:
    without = {name for name, condition in writes() if not OF_TOKEN.search(condition)}
    assert without == {*BY_STATE, *BY_OUTBOX}
