"""A worker's ledger thread and its bodies: claim, release, and the fate of their answers."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model import books
from tests.model.moves import Step, Violation, is_open, use, with_job, with_worker
from tests.model.state import (
    ADMITTED,
    CLAIM_AGAIN,
    CLAIMED,
    DISOWNED,
    HANDED,
    HOLDING,
    LISTED,
    NO_BOOK,
    NOBODY,
    OVER,
    REFUSED,
    RELEASED,
    RETURNED,
    RUNNING,
    STARTED,
    STEP_ENDED,
    STEP_RUNNING,
    SUCCEEDED,
    UP,
    WAITING,
    WORKERS,
    Bounds,
    Held,
    Job,
    Record,
    Rules,
    State,
    Token,
    Worker,
)


def _may_call(state: State, worker: int, rules: Rules) -> bool:
    """Return True if the ledger's thread of a worker may call a script now."""
    me = state.workers[worker]
    if me.process != UP or me.asking or not is_open(state) or me.epoch != state.common.books:
        return False
    return not (rules.renewal_exclusive and me.list == LISTED)


def claim(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Claim a message that came, or a message whose answer was lost (lua/jobs/claim.lua)."""
    for worker in WORKERS:
        if state.workers[worker].unsure or not _may_call(state, worker, rules):
            continue
        me = state.workers[worker]
        for index, job in enumerate(state.jobs):
            for message in [message for message in job.messages if message[0] == worker]:
                rest = list(job.messages)
                rest.remove(message)
                arrived = job._replace(messages=tuple(rest))
                yield _claimed(state, worker, me, index, arrived, message[1:], False, rules)
            for attempt in job.held[worker]:
                if attempt.phase == CLAIM_AGAIN:
                    asked = books.with_held(job, worker, [other for other in job.held[worker] if other != attempt])
                    yield _claimed(state, worker, me, index, asked, attempt[:2], True, rules)


def _claimed(
    state: State, worker: int, me: Worker, index: int, job: Job, token: tuple[int, int], again: bool, rules: Rules
) -> Step:
    card = job.card
    mine = card and me.book != NO_BOOK and (card.epoch, card.attempt, card.worker) == (*token, worker)
    free = card and (card.state == ADMITTED or (card.state == RUNNING and (again or not rules.claim_once)))
    if not card or not mine or not free:
        return "a claim is refused", index, worker, with_job(state, index, job)
    if card.state == ADMITTED:
        record = Record(card.epoch, card.attempt, STEP_RUNNING, RUNNING, card.losses, worker)
        job = job._replace(card=card._replace(state=RUNNING, started=True), entries=books.note(job, record))
    job = books.with_held(job, worker, (*job.held[worker], Held(*token, CLAIMED)))
    after = with_worker(with_job(state, index, job), worker, me._replace(asking=True))
    return "a claim is granted", index, worker, after


def release(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Release an attempt: give back, note the end, and hand over a job that fits now (lua/jobs/release.lua)."""
    for worker in WORKERS:
        me = state.workers[worker]
        if me.unsure or not _may_call(state, worker, rules):
            continue
        for index, job in enumerate(state.jobs):
            for held in job.held[worker]:
                if held.phase == RETURNED:
                    yield from _released(state, worker, me, index, job, held, rules)
                elif held.phase == REFUSED:
                    yield "a job is handed back", index, worker, with_job(state, index, _handed_back(job, worker, held))


def _released(state: State, worker: int, me: Worker, index: int, job: Job, held: Held, rules: Rules) -> Iterator[Step]:
    card, token, rest = job.card, held[:2], [attempt for attempt in job.held[worker] if attempt != held]
    same = bool(card) and (card.epoch, card.attempt) == token  # type: ignore[union-attr]
    if card and same and card.state == OVER and card.became == SUCCEEDED:
        job = books.with_held(job, worker, [*rest, Held(*token, RELEASED)])
        yield (
            "a release is repeated",
            index,
            worker,
            with_worker(with_job(state, index, job), worker, me._replace(asking=True)),
        )
        return
    if not card or not same or card.state not in HOLDING or card.worker != worker or me.book == NO_BOOK:
        yield "a release is refused", index, worker, with_job(state, index, books.with_held(job, worker, rest))
        return
    job = books.with_held(books.end(job, rules), worker, [*rest, Held(*token, RELEASED)])
    after = with_worker(with_job(state, index, job), worker, me._replace(asking=True))
    waiting = (
        []
        if not books.has_room(after, worker)
        else [number for number, other in enumerate(after.jobs) if other.card and other.card.state == WAITING]
    )
    for number in waiting:
        other = books.hand_over(after.jobs[number], worker, state.common.books)
        card = other.card
        assert card
        other = books.with_held(other, worker, (*other.held[worker], Held(card.epoch, card.attempt, HANDED)))
        yield "a release hands the next job over", number, worker, with_job(after, number, other)
    if not waiting:
        yield "a release is carried out", index, worker, after


def _handed_back(job: Job, worker: int, held: Held) -> Job:
    """Put a job into the backlog again, which counts as no loss."""
    job, card = books.with_held(job, worker, [attempt for attempt in job.held[worker] if attempt != held]), job.card
    if card and card.state in HOLDING and (card.epoch, card.attempt, card.worker) == (*held[:2], worker):
        return books.back(job, card, card.losses)
    return job


def hand_over_again(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Ask for the jobs that came with a lost answer, as a worker does (lua/workers/hand_over_again.lua)."""
    for worker in WORKERS:
        me = state.workers[worker]
        if not me.unsure or not _may_call(state, worker, rules):
            continue
        after = with_worker(state, worker, me._replace(unsure=False, asking=True))
        was_given = False
        for index, job in enumerate(state.jobs):
            card = job.card
            in_memory = any(attempt.phase in (CLAIM_AGAIN, STARTED, RETURNED, REFUSED) for attempt in job.held[worker])
            if card and card.state == RUNNING and card.worker == worker and card.message and not in_memory:
                was_given = True
                held = (*job.held[worker], Held(card.epoch, card.attempt, HANDED))
                after = with_job(after, index, books.with_held(job, worker, held))
        if not was_given:
            after = with_worker(state, worker, me._replace(unsure=False))
        yield "what an answer had is asked for", NOBODY, worker, after


def take_answer(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Take the answer of a claim, a release or a handing over again: bodies start, ends are left to be written."""
    for worker in WORKERS:
        me = state.workers[worker]
        if me.process != UP or not me.asking:
            continue
        after = with_worker(state, worker, me._replace(asking=False))
        for index, job in enumerate(state.jobs):
            held: list[Held] = []
            for attempt in job.held[worker]:
                token = attempt[:2]
                if attempt.phase in (CLAIMED, HANDED):
                    job, phase = _start(after, worker, job, token, bounds)
                    held.append(attempt._replace(phase=phase))
                elif attempt.phase == RELEASED:
                    record = Record(*token, STEP_ENDED, SUCCEEDED, 0, worker)
                    job = books.with_pending(job, worker, (*job.pending[worker], record))
                else:
                    held.append(attempt)
            after = with_job(after, index, books.with_held(job, worker, held))
        yield "an answer is taken", NOBODY, worker, after


def _start(state: State, worker: int, job: Job, token: Token, bounds: Bounds) -> tuple[Job, int]:
    """Start a body, or hand its job back if it does not fit by its worker's own count."""
    if any(attempt.phase in (STARTED, DISOWNED) for each in state.jobs for attempt in each.held[worker]):
        return job, REFUSED
    record = Record(*token, STEP_RUNNING, RUNNING, 0, worker)
    job = books.with_pending(job, worker, (*job.pending[worker], record))
    if token in job.starts:
        raise Violation(f"two starts of one attempt: {token[0]}.{token[1]} started before")
    if not job.rerun and job.starts:
        raise Violation("a job that must not run again started twice")
    if state.workers[worker].epoch == state.common.epoch and any(end[:2] < token for end in _ends(state, job, bounds)):
        raise Violation("a body starts though the end of its job is known")
    return job._replace(starts=tuple(sorted((*job.starts, token)))), STARTED


def _ends(state: State, job: Job, bounds: Bounds) -> list[Record]:
    """Return the ends that Postgres has or will take, and that the stream or a live worker's memory has."""
    if job.row and job.row.state == SUCCEEDED and not bounds.faults.pause:
        return [job.row]
    ends = list(job.entries)
    for other in WORKERS:
        them = state.workers[other]
        # The opener does not wait for a stopped worker.
        was_stopped = state.common.faults.pause < bounds.faults.pause and them.epoch != state.common.epoch
        if them.process == UP and not them.lost and not was_stopped:
            ends += job.pending[other]
    return [end for end in ends if end.state == SUCCEEDED and job.row and end[:3] > job.row[:3]]


def lose_answer(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Lose an answer: the script was carried out, but its caller gives up waiting, and does not know."""
    faults = use(state, "lost_answer")
    if faults is None:
        return
    for worker in WORKERS:
        me = state.workers[worker]
        if me.process != UP or not me.asking:
            continue
        after = with_worker(state, worker, me._replace(asking=False, unsure=True))
        for index, job in enumerate(state.jobs):
            if not job.held[worker]:
                continue
            held = []
            for attempt in job.held[worker]:
                if attempt.phase == CLAIMED:
                    held.append(attempt._replace(phase=CLAIM_AGAIN))
                elif attempt.phase == RELEASED:
                    held.append(attempt._replace(phase=RETURNED))
                elif attempt.phase != HANDED:
                    held.append(attempt)
            after = with_job(after, index, books.with_held(job, worker, held))
        yield "an answer is lost", NOBODY, worker, after._replace(common=state.common._replace(faults=faults))


def body_returns(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Let a body return: its last line runs; of a disowned body nothing is left."""
    for worker in WORKERS:
        if state.workers[worker].process != UP:
            continue
        for index, job in enumerate(state.jobs):
            for attempt in job.held[worker]:
                if attempt.phase in (STARTED, DISOWNED):
                    rest = [other for other in job.held[worker] if other != attempt]
                    if attempt.phase == STARTED:
                        rest.append(attempt._replace(phase=RETURNED))
                    yield "a body returns", index, worker, with_job(state, index, books.with_held(job, worker, rest))


def write_outcomes(state: State, rules: Rules, bounds: Bounds) -> Iterator[Step]:
    """Write the pending outcomes of a job, as a worker's recorder does."""
    for worker in WORKERS:
        if state.workers[worker].process != UP:
            continue
        for index, job in enumerate(state.jobs):
            if job.pending[worker]:
                done = books.with_pending(books.write(job, job.pending[worker], rules), worker, ())
                yield "a worker writes its outcomes", index, worker, with_job(state, index, done)
