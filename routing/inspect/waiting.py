"""The backlog as the ledger has it: a line for the waiting jobs of each request, tasks that no worker knows first."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import redis as redispy

from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.model.request import Request, split_shape
from celery_capacity.routing.policy.placement import SUBMISSIONS, TOP_PRIORITY, order

_PRIORITIES: Final = range(TOP_PRIORITY + 1)


@dataclass(frozen=True, slots=True)
class BacklogLine:
    """The waiting jobs of one request. `oldest`: seconds since the first of them was submitted.

    `unknown_task`: their task, where no live worker has registered it; else "".
    """

    request: Request
    waiting: int
    oldest: float | None
    unknown_task: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "queue": self.request.queue,
            "request": self.request.to_people(),
            "waiting": self.waiting,
            "oldest_seconds": None if self.oldest is None else round(self.oldest, 3),
            "unknown_task": self.unknown_task or None,
        }


def ask_queues(pipe: Any, shapes: Sequence[str]) -> None:
    """Add to a pipeline the reads of the queues of these shapes. `read_backlog` takes the replies."""
    for shape in shapes:
        pipe.zcard(keys.wait(shape))
        for priority in _PRIORITIES:
            # The first of each priority is the oldest of that priority.
            first = order(priority, 0)
            pipe.zrangebyscore(keys.wait(shape), first, first + SUBMISSIONS - 1, start=0, num=1)


def read_backlog(
    client: redispy.Redis, head: snapshot.Head, replies: Iterator[Any], catalogues: Collection[str]
) -> tuple[BacklogLine, ...]:
    """Return the lines of the backlog, in one more round trip. `catalogues`: those of the live workers."""
    queues = [(shape, int(next(replies)), _firsts(replies)) for shape in head.shapes]
    jobs = [job for _, _, firsts in queues for job in firsts]
    # A worker without a catalogue takes any task. Without a worker there is another reason to wait.
    names = {split_shape(shape)[1] for shape in head.shapes} - {""} if catalogues and "" not in catalogues else set()
    pipe = client.pipeline(transaction=False)
    for job in jobs:
        pipe.hget(keys.job(job), "submitted")
    for name in names:
        for catalogue in catalogues:
            pipe.sismember(keys.tasks(catalogue), name)
    answers = iter(pipe.execute())
    submitted = {job: int(time) for job, time in ((job, next(answers)) for job in jobs) if time and int(time) > 0}
    unknown = {name for name in names if sum(int(next(answers)) for _ in catalogues) == 0}
    lines: dict[tuple[str, str], BacklogLine] = {}
    for shape, waiting, firsts in queues:
        asked, name = split_shape(shape)
        task = name if name in unknown else ""
        times = [submitted[job] for job in firsts if job in submitted]
        oldest = max(0.0, (head.now - min(times)) / 1000) if times else None
        key = (task, asked)
        if waiting:
            line = BacklogLine(Request.from_shape(asked), waiting, oldest, unquote(task))
            lines[key] = _together(lines[key], line) if key in lines else line
    return tuple(sorted(lines.values(), key=lambda line: not line.unknown_task))


def _together(first: BacklogLine, second: BacklogLine) -> BacklogLine:
    """Return the line of two tasks with one request."""
    ages = [line.oldest for line in (first, second) if line.oldest is not None]
    return BacklogLine(first.request, first.waiting + second.waiting, max(ages, default=None), first.unknown_task)


def _firsts(replies: Iterator[Any]) -> list[str]:
    return [snapshot.text(members[0]) for members in (next(replies) for _ in _PRIORITIES) if members]
