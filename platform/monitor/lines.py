"""Changes of jobs as lines. A thread listens, and the changes are printed in the order in which they came."""

from __future__ import annotations

import queue
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from rich.text import Text
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celery_capacity.platform.console.names import is_like
from celery_capacity.platform.console.terminal import NOTHING, STATE_STYLES, facts, harmless, moment, print_json, talk
from celery_capacity.platform.web.transitions import PATIENCE, Transitions
from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger.connection import quick_client
from celery_capacity.routing.model.states import Store

if TYPE_CHECKING:
    from celery_capacity.workers.process.stores import Stores

#: Changes that wait to be printed. Where the output is slower, further ones are left out, and their number is said.
MAX_PENDING: Final = 10_000
#: Changes whose tasks are looked up at once.
BATCH: Final = 500
#: Jobs whose tasks are remembered.
REMEMBERED: Final = 10_000
#: Characters of the longest state.
STATE_WIDTH: Final = 9

_TASKS: Final = text("SELECT id, name FROM jobs WHERE id = ANY(CAST(:ids AS text[]))")


@dataclass(frozen=True, slots=True)
class Line:
    """A job came into a state. `at`: ISO 8601, None for a change that was over when the job was looked at."""

    job: str
    task: str | None
    state: str
    attempt: int
    worker: str | None
    at: str | None


Write = Callable[[Line], None]


def writer(as_json: bool) -> Write:
    """Return what prints a line."""
    if as_json:
        return lambda line: print_json(asdict(line))
    console = facts()

    def write(line: Line) -> None:
        when = NOTHING if line.at is None else moment(datetime.fromisoformat(line.at))
        attempt = f"  attempt {line.attempt}" if line.attempt > 1 else ""
        state = Text(f"{line.state:<{STATE_WIDTH}}", STATE_STYLES.get(line.state, ""))
        rest = f"  {line.job}  {line.task or NOTHING}  {line.worker or NOTHING}{attempt}"
        console.print(Text.assemble(f"{when:<19}  ", state, harmless(rest)))

    return write


class _Tasks:
    """Tasks of jobs, looked up in Postgres once each."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._names: OrderedDict[str, str] = OrderedDict()
        #: True if the last look found Postgres away.
        self.away = False

    def of(self, jobs: Sequence[str]) -> dict[str, str]:
        """Return the task of each of these jobs; a job whose row cannot be read is left out."""
        missing = [job for job in dict.fromkeys(jobs) if job not in self._names]
        if missing:
            try:
                with self._stores.engine.connect() as connection:
                    self._names.update({row.id: row.name for row in connection.execute(_TASKS, {"ids": missing})})
                self.away = False
            except (DBAPIError, PoolTimeout):
                self.away = True
        names = {job: self._names[job] for job in jobs if job in self._names}
        while len(self._names) > REMEMBERED:
            self._names.popitem(last=False)
        return names


class Heard:
    """Changes that the listener's thread has heard, for the thread that prints."""

    def __init__(self) -> None:
        self._changes: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue(MAX_PENDING)
        self._dropped = 0
        self._error: Exception | None = None

    def put(self, kind: str, data: dict[str, Any]) -> None:
        try:
            self._changes.put_nowait((kind, data))
        except queue.Full:
            self._dropped += 1

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """Wait for a change; return it with those that came meanwhile."""
        batch = [self._changes.get()]
        with suppress(queue.Empty):
            while len(batch) < BATCH:
                batch.append(self._changes.get_nowait())
        return batch

    def fail(self, error: Exception) -> None:
        """End the changes: nothing is heard any more, for this error."""
        self._error = error
        self.put("failure", {})

    def check(self) -> None:
        """Raise the error that ended the changes, once all changes before it were taken."""
        if self._error is not None and self._changes.empty():
            raise self._error

    def dropped(self) -> int:
        """Return how many changes were left out since the last call."""
        number, self._dropped = self._dropped, 0
        return number


def follow_all(stores: Stores, task: str | None, write: Write) -> None:
    """Print the changes of all jobs, or of those whose task is like `task`, until Ctrl-C.

    Raises `StoreUnavailable` where no store answers at first.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        # The command's own handler would end the process by the signal, and Ctrl-C is the usual end of this one.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    heard, ended, tasks = Heard(), threading.Event(), _Tasks(stores)
    transitions = Transitions(
        lambda: quick_client(stores.redis), lambda: stores.engine, heard.put, lambda: not ended.is_set(), ended.wait
    )

    def listen() -> None:
        try:
            while not ended.is_set():
                transitions.hear()
                if transitions.source is None:
                    heard.put("silence", {})
        except Exception as error:
            heard.fail(error)

    thread = threading.Thread(target=listen, name="events", daemon=True)
    thread.start()
    answered = away = False
    try:
        while True:
            batch = heard.take()
            names = tasks.of([data["job"] for kind, data in batch if kind == "job"])
            if tasks.away != away:
                away = tasks.away
                _say_away(away, task)
            for kind, data in batch:
                if kind == "source":
                    _say_source(data["source"], answered)
                    answered = True
                elif kind == "silence" and not answered:
                    raise StoreUnavailable("neither Redis nor Postgres answers")
                elif kind == "job":
                    name = names.get(data["job"])
                    if task is None or (name is not None and is_like(name, task)):
                        write(Line(task=name, **data))
            if left_out := heard.dropped():
                talk().print(f"Warning: {left_out:,} changes are left out: the output is slower than they come.")
            heard.check()
    except KeyboardInterrupt:
        pass
    finally:
        ended.set()
        thread.join(2 * PATIENCE)


def _say_away(away: bool, task: str | None) -> None:
    """Say that Postgres, which has the tasks of the jobs, went away or is back."""
    if not away:
        talk().print("Postgres answers again.")
    elif task is None:
        talk().print("Warning: Postgres does not answer; the tasks of new jobs are unknown until it does.")
    else:
        talk().print(
            f"Warning: Postgres does not answer; changes of new jobs are left out until it says which are of {task}."
        )


def _say_source(source: str | None, answered: bool) -> None:
    """Say that the changes come from another store, between which some may be missing."""
    if source is None:
        talk().print("Warning: no store answers; changes come again when one does.")
    elif answered or source == Store.POSTGRES:
        talk().print(f"Changes come from {'Postgres' if source == Store.POSTGRES else 'the ledger'} now.")
