"""All steps of the protocol: functions from a state to the states after it, with the name of the step.

A script whose answer travels takes two steps: the script is carried out, and its answer is taken. Between them a crash,
a delay or any other step has its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from tests.model import duties, epochs, executing, heartbeats, membership, submitting
from tests.model.moves import Step
from tests.model.state import FINAL, OVER, Bounds, Rules, State

Way = Callable[[State, Rules, Bounds], Iterator[Step]]
WAYS: Final[tuple[Way, ...]] = (
    submitting.accept,
    submitting.read_row,
    submitting.submit,
    submitting.fill,
    submitting.redeliver,
    executing.claim,
    executing.release,
    executing.hand_over_again,
    executing.take_answer,
    executing.lose_answer,
    executing.body_returns,
    executing.write_outcomes,
    heartbeats.make_list,
    heartbeats.renew,
    heartbeats.time_passes,
    heartbeats.list_times_out,
    membership.register,
    membership.rejoin,
    membership.crash,
    membership.stop,
    membership.go_on,
    membership.lapse,
    duties.apply_stream,
    duties.expire,
    duties.reconcile,
    epochs.empty,
    epochs.restart,
    epochs.begin_opening,
    epochs.wipe,
    epochs.fall_silent,
    epochs.stray_wipe,
    epochs.open_epoch,
    epochs.reserve_book,
)


def is_over(state: State) -> bool:
    """Return True if all accepted jobs have ended, and nothing is held or on its way (I2, I3)."""
    return all(
        job.row
        and job.row.state in FINAL
        and not job.entries
        and not any(job.held)
        and not any(job.pending)
        and (not job.card or job.card.state == OVER)
        for job in state.jobs
    )
