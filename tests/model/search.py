"""A breadth-first search over all states that the steps of the model reach, and its result."""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.model.moves import FAULTS, Violation
from tests.model.state import NOBODY, STATE_NAMES, Bounds, Rules, State, canonical, initial
from tests.model.steps import WAYS, is_over

#: States between two calls of `progress`.
SHOW_EVERY = 5_000


@dataclass
class Found:
    """The result of a search.

    `violation`: the broken invariant, or '' if there is none; `trace` has the steps that lead there. `seconds`: seconds
    of CPU.
    """

    bounds: Bounds
    rules: Rules
    states: int = 0
    steps: int = 0
    depth: int = 0
    seconds: float = 0.0
    violation: str = ""
    trace: list[str] = field(default_factory=list)


def search(
    bounds: Bounds,
    rules: Rules = Rules(),  # noqa: B008  immutable
    progress: Callable[[int, int], None] = lambda states, waiting: None,
    most: int | None = None,
) -> Found:
    """Visit every state; stop at the first violation, or after `most` states, which the text then reports."""
    gc.disable()
    try:
        return _search(bounds, rules, progress, most)
    finally:
        gc.enable()


def _search(bounds: Bounds, rules: Rules, progress: Callable[[int, int], None], most: int | None) -> Found:
    began, result = time.process_time(), Found(bounds, rules)
    states: list[State] = [initial(bounds)]
    numbers: dict[State, int] = {states[0]: 0}
    parents = array("l", [-1])
    sources, targets = array("l"), array("l")
    level_ends, number = 1, 0
    while number < len(states) and not result.violation:
        if number == level_ends:
            result.depth, level_ends = result.depth + 1, len(states)
        state = states[number]
        try:
            for way in WAYS:
                for name, _, _, after in way(state, rules, bounds):
                    result.steps += 1
                    after = canonical(after)
                    target = numbers.get(after)
                    if target is None:
                        target = numbers[after] = len(states)
                        states.append(after)
                        parents.append(number)
                    if name not in FAULTS:
                        sources.append(number)
                        targets.append(target)
        except Violation as violation:
            result.violation = str(violation)
            result.trace = _trace(states, parents, number, rules, bounds)
        number += 1
        if number % SHOW_EVERY == 0:
            progress(number, len(states) - number)
        if most is not None and len(states) > most and not result.violation:
            result.violation = f"more than {most} states"
    result.states = len(states)
    if not result.violation:
        stuck = _first_stuck(states, sources, targets)
        if stuck is not None:
            result.violation = "I2: no end can be reached from here without another fault"
            result.trace = _trace(states, parents, stuck, rules, bounds)
    result.seconds = time.process_time() - began
    return result


def _first_stuck(states: list[State], sources: array[int], targets: array[int]) -> int | None:
    """Return the first state from which no state can be reached in which all is over; edges of faults do not count."""
    before: list[list[int]] = [[] for _ in states]
    for source, target in zip(sources, targets, strict=True):
        before[target].append(source)
    good = bytearray(len(states))
    todo = [number for number, state in enumerate(states) if is_over(state)]
    for number in todo:
        good[number] = 1
    while todo:
        for number in before[todo.pop()]:
            if not good[number]:
                good[number] = 1
                todo.append(number)
    return next((number for number in range(len(states)) if not good[number]), None)


def _trace(states: list[State], parents: array[int], number: int, rules: Rules, bounds: Bounds) -> list[str]:
    """Return the steps to a state and the refused step there, with the same name for each job and worker throughout."""
    path = [number]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    now, lines = states[0], []
    for following in [states[index] for index in reversed(path)][1:]:
        name, job, worker, now = next(
            step for way in WAYS for step in way(now, rules, bounds) if canonical(step[3]) == following
        )
        lines.append(_line(name, job, worker, now))
    for way in WAYS:
        try:
            for _ in way(now, rules, bounds):
                pass
        except Violation as violation:
            lines.append(f"{way.__name__.replace('_', ' ')}: {violation}")
    return lines


def _line(name: str, job: int, worker: int, state: State) -> str:
    who = "".join(
        (f" [job {job + 1}]" if job != NOBODY else "", f" [worker {'ab'[worker]}]" if worker != NOBODY else "")
    )
    cards = []
    for number, entry in enumerate(state.jobs, 1):
        row = f"{STATE_NAMES[entry.row.state]} {entry.row.epoch}.{entry.row.attempt}" if entry.row else "-"
        card = f"{STATE_NAMES[entry.card.state]} {entry.card.epoch}.{entry.card.attempt}" if entry.card else "-"
        cards.append(f"job {number}: row {row}, ledger {card}")
    return f"{name}{who}  ({'; '.join(cards)})"
