"""Effects of the ends of attempts on their jobs."""

from __future__ import annotations

from dataclasses import dataclass

from celery_capacity.routing.model.states import Outcome, State, Step


@dataclass(frozen=True, slots=True)
class Became:
    """Effect of the end of an attempt on its job. A job with a successor in Postgres goes on with that."""

    state: State
    step: Step
    losses: int


def became(outcome: Outcome, losses: int, most_losses: int, rerun: bool) -> Became:
    """Return the effect of an end. `outcome` as in `replies.Ended`; `losses`: those of the attempts before."""
    if outcome in (Outcome.RETRIED, Outcome.REQUEUED):
        return Became(State.SCHEDULED, Step.BACK, losses)
    if outcome in (Outcome.HANDED_BACK, Outcome.TAKEN_BACK):
        return Became(State.ACCEPTED, Step.BACK, losses)
    if outcome == Outcome.LOST:
        again = rerun and losses + 1 < most_losses
        return Became(State.ACCEPTED if again else State.LOST, Step.BACK if again else Step.ENDED, losses + 1)
    return Became(State(outcome), Step.ENDED, losses)
