"""The table of transitions: its rules, and the diagram in the documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing.model.states import (
    FINAL,
    HOLDING,
    TRANSITIONS,
    Event,
    State,
    Step,
)

DOCS = Path(__file__).parents[4] / "docs/reference/states.md"


def sources(event: Event) -> list[State]:
    """Return the states in which an event can happen."""
    return [state for state in State if (state, event) in TRANSITIONS]


def after(state: State) -> Step:
    """Return the step of an attempt by which its job came into this state.

    A job without an attempt has `Step.NONE`; between two attempts a job takes `Step.FILED` or `Step.DROPPED`.
    """
    if state is State.ADMITTED:
        return Step.ADMITTED
    if state is State.RUNNING:
        return Step.RUNNING
    return Step.ENDED if state in FINAL or state is State.REPLACED else Step.BACK


def diagram() -> str:
    """Return the table as a Mermaid state diagram; edges between the same two states share one arrow."""
    words: dict[tuple[State, State], list[str]] = {}
    for (state, event), target in TRANSITIONS.items():
        words.setdefault((state, target), []).append(event.value)
    lines = ["stateDiagram-v2", f"    [*] --> {State.ACCEPTED.value}: submit"]
    for state in State:
        lines += [
            f"    {state.value} --> {target.value}: {', '.join(words[state, target])}"
            for target in State
            if (state, target) in words
        ]
    lines += [f"    {state.value} --> [*]" for state in State if state in FINAL]
    return "\n".join(lines)


def test_people_see_these_words() -> None:
    assert [str(state) for state in State] == [
        "accepted", "waiting", "scheduled", "admitted", "running", "replaced",
        "succeeded", "failed", "cancelled", "expired", "lost",
    ]  # fmt: skip


def test_a_final_state_has_no_exit_and_every_other_has_one() -> None:
    for state in State:
        assert any(source is state for source, _ in TRANSITIONS) == (state not in FINAL)


def test_every_state_is_reached_and_every_event_happens_somewhere() -> None:
    reached, new = {State.ACCEPTED}, {State.ACCEPTED}
    while new:
        new = {target for (state, _), target in TRANSITIONS.items() if state in new} - reached
        reached |= new
    assert reached == set(State)
    assert all(sources(event) for event in Event)


def test_every_job_that_is_not_final_can_still_end() -> None:
    for state in set(State) - FINAL:
        assert any(target in FINAL for (source, _), target in TRANSITIONS.items() if source is state)


def test_an_event_leads_to_one_state_wherever_it_happens() -> None:
    for event in Event:
        assert len({TRANSITIONS[state, event] for state in sources(event)}) == 1


@pytest.mark.parametrize(
    ("state", "event", "target"),
    [
        (State.ACCEPTED, Event.FILE, State.WAITING),
        (State.ACCEPTED, Event.SCHEDULE, State.SCHEDULED),
        (State.ACCEPTED, Event.ADMIT, State.ADMITTED),
        (State.SCHEDULED, Event.ADMIT, State.ADMITTED),
        (State.WAITING, Event.ADMIT, State.ADMITTED),
        (State.ADMITTED, Event.CLAIM, State.RUNNING),
        (State.ADMITTED, Event.HAND_BACK, State.WAITING),
        (State.RUNNING, Event.TAKE_BACK, State.WAITING),
        (State.RUNNING, Event.RESUBMIT, State.ACCEPTED),
        (State.RUNNING, Event.RETRY, State.ACCEPTED),
        (State.RUNNING, Event.RETRY_LATER, State.SCHEDULED),
        (State.RUNNING, Event.REPLACE, State.REPLACED),
        (State.REPLACED, Event.CONTINUE, State.ACCEPTED),
        (State.RUNNING, Event.SUCCEED, State.SUCCEEDED),
        (State.WAITING, Event.CANCEL, State.CANCELLED),
        (State.RUNNING, Event.LOSE, State.LOST),
    ],
)
def test_event_leads_a_job_to_its_next_state(state: State, event: Event, target: State) -> None:
    assert TRANSITIONS[state, event] is target


def test_a_job_that_was_never_claimed_cannot_be_handed_back() -> None:
    possible = {event for event in Event if (State.WAITING, event) in TRANSITIONS}
    assert possible == {Event.ADMIT, Event.ADOPT, Event.CANCEL, Event.EXPIRE, Event.FAIL}


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_no_walk_through_the_table_leaves_a_final_state(walk: list[Event]) -> None:
    state, ended = State.ACCEPTED, 0
    for event in walk:
        if (state, event) in TRANSITIONS:
            assert state not in FINAL
            state = TRANSITIONS[state, event]
            ended += state in FINAL
    assert ended <= 1


def test_inside_an_attempt_the_step_only_grows() -> None:
    for (state, event), target in TRANSITIONS.items():
        if state in HOLDING and event is not Event.ADOPT:
            assert after(target) > after(state)


def test_the_steps_are_in_the_order_in_which_they_are_declared() -> None:
    assert list(Step) == sorted(Step)
    assert len(set(map(int, Step))) == len(Step.__members__)
    assert (Step.NONE, Step.ADMITTED, Step.RUNNING, Step.ENDED, Step.BACK) == (0, 1, 2, 9, 10)


def test_the_step_after_each_state() -> None:
    assert {state: after(state) for state in State} == {
        State.ACCEPTED: Step.BACK,
        State.WAITING: Step.BACK,
        State.SCHEDULED: Step.BACK,
        State.ADMITTED: Step.ADMITTED,
        State.RUNNING: Step.RUNNING,
        State.REPLACED: Step.ENDED,
        **dict.fromkeys(FINAL, Step.ENDED),
    }


def test_the_diagram_has_the_edges_of_the_table_and_no_other() -> None:
    drawn = {
        (State(state), Event(word)): State(target)
        for state, target, words in re.findall(r"(\w+) --> (\w+): (.+)", diagram())
        for word in words.split(", ")
    }
    assert drawn == TRANSITIONS
    assert set(re.findall(r"(\w+) --> \[\*\]", diagram())) == {state.value for state in FINAL}


def test_the_diagram_in_the_docs_is_drawn_from_the_table() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert re.findall(r"```mermaid\n(.*?)\n```", text, re.DOTALL) == [diagram()]
    assert re.findall(r"^\| (\w+) \|", text, re.MULTILINE)[1:] == [state.value for state in State]
