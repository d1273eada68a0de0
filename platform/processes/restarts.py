"""Rules for a child that ended by itself: whether it is started again, and after which pause."""

from __future__ import annotations

from dataclasses import dataclass

from celery_capacity.workers.process.exit_codes import Exit

#: Seconds of life after which a child counts as steady: its next end begins a new count.
STEADY = 30.0

#: Ends in a row, each soon after a start, after which a child is given up.
MAX_FAILURES = 5

#: Seconds of the first pause before a restart. Each further pause is twice as long, up to the longest.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0

#: Exit codes that the next start would give too.
HOPELESS: dict[int, str] = {
    Exit.USAGE: "its command line is wrong",
    Exit.CONFIGURATION: "its configuration is wrong",
}

#: Reason for `UNAVAILABLE` of a worker. A store that does not answer makes a worker wait instead.
NAME_TAKEN = "its name belongs to a live worker"


@dataclass(frozen=True)
class Verdict:
    """`pause` in seconds until the next start, None for no start; `failures` so far; `text` for people."""

    pause: float | None
    failures: int
    text: str


def after_end(code: int, *, lived: float, was_ready: bool, failures: int, worker: bool) -> Verdict:
    """Judge the end of a child with this exit code, negative for a signal, `lived` seconds after its start.

    `failures` counts the ends in a row before this one.
    """
    if code == Exit.OK:
        return Verdict(None, 0, "It was told to end, and is not started again.")
    reason = NAME_TAKEN if worker and code == Exit.UNAVAILABLE else HOPELESS.get(code)
    if reason is not None:
        return Verdict(None, failures, f"It is not started again: {reason}.")
    if code > 0 and not was_ready and failures == 0:
        return Verdict(None, failures, "It is not started again: it was never ready.")
    failures = 1 if lived >= STEADY else failures + 1
    if failures > MAX_FAILURES:
        return Verdict(
            None, failures, f"It is given up: it ended {failures} times in a row, each time soon after its start."
        )
    pause = min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE)
    return Verdict(pause, failures, f"It is started again in {pause:g} s.")
