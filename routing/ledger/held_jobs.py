"""The list of a worker's attempts, and the scripts that go through it.

The list of a worker may be long, or hold stray entries. A script that read the whole list would hold up all others. So
the list is read here in pages, and each script gets the ids of the jobs that it looks at. The script reads each job
once more, so that a change between the reading and the script does no harm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from redis.exceptions import WatchError

from celery_capacity.routing.errors import StoreUnavailable
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.admission import Admission, flag
from celery_capacity.routing.ledger.replies import Adopted, AdoptVerdict, HandedOver, Lapsed, LapseVerdict, hand_overs
from celery_capacity.routing.ledger.scripts import HELD
from celery_capacity.routing.ledger.signatures import Group, Reply
from celery_capacity.routing.model.request import split_shape
from celery_capacity.routing.model.states import HOLDING
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy.labels import labels_text

#: Entries of a list that one script looks at. Each may be put back into the backlog, in some ten commands.
PAGE: Final = 100
#: How often a long list is counted again, because jobs came or went meanwhile.
TRIES: Final = 10
#: Books counted in one round trip, during which the server serves nobody else.
BOOKS: Final = 50


class Held(Admission):
    """Scripts that go through the jobs of a worker, one method each."""

    def held_pages(self, worker: str, page: int = PAGE) -> Iterator[list[str]]:
        """Read the ids in a worker's list, page by page. An id that stays in the list comes at least once."""
        cursor, ids = 0, list[str]()
        while True:
            cursor, entries = self._scan_held(worker, cursor, page)
            ids += entries
            while len(ids) >= page or (ids and not cursor):
                yield ids[:page]
                ids = ids[page:]
            if not cursor:
                return

    def _scan_held(self, worker: str, cursor: int, count: int) -> tuple[int, list[str]]:
        cursor, entries = self._guard(lambda: self.client.hscan(keys.held(worker), cursor, count=count))
        return cursor, [snapshot.text(job) for job in entries]

    # -- sums ----------------------------------------------------------------------------------------------------

    def recount(self, workers: Sequence[str]) -> list[int]:
        """Make the allocations of each worker the sum of the jobs it holds, and repair its places in the indexes.

        Returns for each worker the number of values that differed.
        """
        counts: list[int] = []
        for start in range(0, len(workers), BOOKS):
            names = workers[start : start + BOOKS]
            replies = self._calls([self._prepared("recount", worker=name, counted="") for name in names])
            for name, values in zip(names, replies, strict=True):
                reply = self._reply("recount", values)
                counts.append(self._recount_in_pages(name) if reply.head == "many" else reply.number("differed"))
        return counts

    def _recount_in_pages(self, worker: str) -> int:
        """Recount a worker whose list is too long for one script.

        Raises `StoreUnavailable` where its list or its book changed during every try.
        """
        taken = self.prune_held(worker)
        for _ in range(TRIES):
            differed = self._recount_unchanged(worker)
            if differed is not None:
                return taken + differed
        raise StoreUnavailable(f"the jobs of worker {worker} change faster than they can be counted")

    def _recount_unchanged(self, worker: str) -> int | None:
        """Recount a worker, and return None where its list or its book changed meanwhile."""
        script = self._scripts["recount"].text

        def count() -> int | None:
            with self.client.pipeline() as pipe:
                pipe.watch(keys.held(worker), keys.book(worker))  # type: ignore[no-untyped-call]
                _, arguments = self._prepared("recount", worker=worker, counted=self._held_sum(worker))
                pipe.multi()
                pipe.eval(script, 0, *arguments)
                try:
                    values = pipe.execute()[0]
                except WatchError:
                    return None
            # A refusal does not raise here. Where the epoch has ended, the next call raises.
            reply = self._reply("recount", [snapshot.text(value) for value in values])
            return reply.number("differed") if reply.head in ("ok", "unknown") else 0

        differed: int | None = self._guard(count)
        return differed

    def count_held(self, workers: Iterable[str]) -> int:
        """Count the jobs of these workers as use of their tenants, where they started before tenants were in use.

        Returns the number of such jobs.
        """
        pages = (page for worker in workers for page in self.held_pages(worker))
        return sum(self._call("count_held", _jobs(page)).number("counted") for page in pages)

    def prune_held(self, worker: str) -> int:
        """Take stray entries, which match no job's own key, out of a worker's list, and return how many."""
        pages = self.held_pages(worker)
        return sum(self._call("prune_held", _jobs(page), worker=worker).number("taken") for page in pages)

    def _held_sum(self, worker: str) -> str:
        """Return the sum of the amounts of a worker's jobs, as a shape; '' where a script can count them itself."""
        sums: Counter[str] = Counter()
        seen: set[str] = set()
        for page in self.held_pages(worker, HELD):
            new = [job for job in page if job not in seen]
            seen.update(new)
            for card in snapshot.read_cards(self.client, new).values():
                if card.worker == worker and card.state in HOLDING:
                    for part in split_shape(card.shape or "")[0].split(","):
                        name, _, amount = part.partition("=")
                        sums[name] += int(amount)
        return "" if len(seen) <= HELD else ",".join(f"{name}={amount}" for name, amount in sorted(sums.items()))

    def _counted(self, script: str, groups: Sequence[Group] = (), *, worker: str, **values: Any) -> Reply:
        """Call a script that counts the jobs held by a worker without a book.

        Nothing changes the list of a worker without a book. Too many jobs for the script are counted here in pages.
        """
        reply = self._call(script, groups, worker=worker, counted="", **values)
        if reply.head == "many":
            self.prune_held(worker)
            reply = self._call(script, groups, worker=worker, counted=self._held_sum(worker), **values)
        return reply

    def reserve_book(
        self, worker: str, incarnation: str, capacity: str, labels: Mapping[str, str] | None = None
    ) -> bool:
        """Open a closed book for a worker that has not registered in this epoch; return False where it has a book."""
        text = labels_text(labels or {})
        reply = self._counted("reserve_book", worker=worker, incarnation=incarnation, capacity=capacity, labels=text)
        return reply.head == "ok"

    # -- taking back ---------------------------------------------------------------------------------------------

    def drain(self, worker: str, incarnation: str) -> int:
        """Stop admission to a worker, and return how many jobs were handed back."""
        handed_back = 0
        # The first call has no jobs: it only stops admission, so that no job joins the list while it is read.
        for page in chain([list[str]()], self.held_pages(worker)):
            shapes = self._call("drain", _jobs(page), worker=worker, incarnation=incarnation).rest
            self.place_shapes(shapes)
            handed_back += len(shapes)
        return handed_back

    def hand_over_again(self, worker: str, incarnation: str, holds: Iterable[str]) -> list[HandedOver]:
        """Return the jobs that a lost reply handed over to this worker, which does not hold them."""
        seen, handed_over = set(holds), list[HandedOver]()
        for page in self.held_pages(worker):
            asked = [job for job in page if job not in seen]
            if asked:
                reply = self._call("hand_over_again", _jobs(asked), worker=worker, incarnation=incarnation)
                handed_over += hand_overs(reply.rest)
                seen.update(asked)
        return handed_over

    def take_back_missing(
        self, worker: str, incarnation: str, holds: Iterable[str], most_losses: int, missing_ms: int
    ) -> list[str]:
        """Take back running jobs that no list has named for `missing_ms`, and return their shapes.

        `holds` is the newest list of the jobs that the worker holds.
        """
        named, absent, shapes = set(holds), set[str](), list[str]()
        for page in self.held_pages(worker, HELD):
            asked = [job for job in page if job not in named]
            for start in range(0, len(asked), PAGE):
                values = {"incarnation": incarnation, "most_losses": most_losses, "missing_for": missing_ms}
                shapes += self._call(
                    "take_back_missing", _jobs(asked[start : start + PAGE]), worker=worker, **values
                ).rest
            absent.update(asked)
        self._named_again(worker, absent)
        return shapes

    def _named_again(self, worker: str, absent: set[str]) -> None:
        """Forget the missing times of jobs that are named again, or gone."""

        def forget() -> None:
            for attempt, _ in self.client.hscan_iter(keys.missing(worker), count=HELD):
                if snapshot.text(attempt).partition(" ")[0] not in absent:
                    self.client.hdel(keys.missing(worker), attempt)

        self._guard(forget)

    def lapse(
        self, worker: str, grace_ms: int, most_losses: int, most: int = PAGE, without: Collection[str] = ()
    ) -> Lapsed:
        """Close a worker whose lease ran out, and take its jobs back once `grace_ms` are over too.

        `most`: jobs to take back at a time; 0 takes none, and only reports that the worker is `due`. The worker keeps
        the jobs in `without`, and with them its book: the verdict is then `waits`.
        """
        taken, page, pages = 0, list[str](), iter(list[list[str]]())
        while True:
            values = {"grace": grace_ms, "most_losses": most_losses, "take": "1" if most else "0", "ttl": self.ttl_ms}
            reply = self._call("lapse", _jobs(page), worker=worker, **values)
            verdict = LapseVerdict(reply.head)
            if verdict is LapseVerdict.UNKNOWN:
                return Lapsed(verdict, incarnation=None, taken_back=taken)
            taken += len(reply.rest)
            self.place_shapes(reply.rest)
            if verdict is not LapseVerdict.MORE:
                return Lapsed(verdict, incarnation=reply["incarnation"], taken_back=taken)
            page = next(pages, [])
            if not page:
                pages = self._held_but(worker, most, without)
                page = next(pages, [])
                if not page and without:
                    return Lapsed(LapseVerdict.WAITS, incarnation=reply["incarnation"], taken_back=taken)

    def _held_but(self, worker: str, page: int, without: Collection[str]) -> Iterator[list[str]]:
        for ids in self.held_pages(worker, page):
            if remaining := [job for job in ids if job not in without]:
                yield remaining

    def adopt(self, worker: str, incarnation: str, held: Sequence[Adopted]) -> list[tuple[str, Token]]:
        """Enter the jobs held since an older epoch, and return the attempts (job, token) that lost their lease."""
        refused: list[tuple[str, Token]] = []
        for start in range(0, len(held), PAGE):
            page = held[start : start + PAGE]
            jobs = [self._adopted_values(job) for job in page]
            reply = self._call("adopt", jobs, worker=worker, incarnation=incarnation)
            self.fill_freed(reply["freed"] if reply.head == "ok" else "")
            verdicts = [AdoptVerdict.STALE.value] * len(page) if reply.head == "unknown" else reply.rest
            answered = zip(page, verdicts, strict=True)
            refused += [(job.job, job.token) for job, verdict in answered if verdict != AdoptVerdict.ADOPTED]
        return refused

    def _adopted_values(self, job: Adopted) -> Group:
        return {
            "job": job.job,
            "token": str(job.token),
            "shape": self.shape_held(job.shape, job.losses),
            "order": job.order,
            "admitted": job.admitted_ms,
            "started": job.started_ms,
            "nonce": job.nonce,
            "losses": job.losses,
            "rerun": flag(job.rerun),
        }


def _jobs(ids: Iterable[str]) -> list[Group]:
    return [{"job": job} for job in ids]
