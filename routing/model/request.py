"""What a job needs: a vector of amounts that a worker must have free, all at once.

A request is immutable and has one form for equal needs, whose text (`shape`) names the set of waiting jobs
with that request in the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from celery_capacity.routing.errors import InvalidRequest, show
from celery_capacity.routing.model import amounts as _amounts
from celery_capacity.routing.model.amounts import (
    ALONE,
    CPUS,
    DEFAULT_QUEUE,
    GPUS,
    LABEL,
    MEMORY,
    ONLY_LABELLED,
    SLOTS,
    Amounts,
)

#: what `@app.task(…)` and `apply_async(…)` accept
REQUEST_OPTIONS = (CPUS, MEMORY, GPUS, "resources")


@dataclass(frozen=True, slots=True)
class Request:
    """`amounts`: (name, millicores | bytes | count) sorted by name, without zeros; `slots` is always there.

    Make one with `from_options`, `from_people`, `from_shape` or `of`; the constructor takes the canonical
    form only and raises `InvalidRequest` otherwise.
    """

    amounts: Amounts

    def __post_init__(self) -> None:
        if self.amounts != _amounts.canonical(self.amounts):
            raise InvalidRequest(
                f"amounts {show(self.amounts)} are not canonical",
                value=self.amounts,
                advice="Make requests with Request.of(mapping).",
            )
        if self.get(SLOTS) < 1:
            raise InvalidRequest("slots=0 is too few", value=0, advice="Every job takes at least one slot.")
        labels = [pair for pair in self.amounts if _amounts.is_label(pair[0])]
        if labels and (len(labels) > 1 or labels[0][1] != 1 or labels[0][0] in (ONLY_LABELLED, LABEL + DEFAULT_QUEUE)):
            raise InvalidRequest(
                f"queues {show(labels)} are not valid", value=labels, advice="A job is in one queue, by one label."
            )

    @classmethod
    def of(cls, given: Mapping[str, int]) -> Request:
        """From internal units (millicores, bytes, counts); one slot where none is given."""
        return cls(_amounts.canonical({SLOTS: 1, **given}))

    @classmethod
    def from_options(cls, options: Mapping[str, Any], default_cpus: int) -> Request:
        """From what a person wrote: `REQUEST_OPTIONS`, others are ignored, and None counts as not given.

        `default_cpus`: millicores where `cpus` is not given.
        """
        return cls.of({CPUS: default_cpus, **_given(options)})

    @classmethod
    def from_people(cls, mapping: Mapping[str, Any]) -> Request:
        """From the JSON that `to_people` makes; `cpus` that are missing are 0."""
        return cls.of(_amounts.from_people(mapping))

    @classmethod
    def from_shape(cls, shape: str) -> Request:
        """From the text that `shape` makes; other texts of the same request are refused."""
        return _from_shape(shape)

    def get(self, name: str) -> int:
        """The amount of one resource; 0 where it is not asked for."""
        for asked, amount in self.amounts:
            if asked == name:
                return amount
        return 0

    @property
    def shape(self) -> str:
        """The canonical text: "cpus=4000,memory=2147483648,slots=1"."""
        return ",".join(f"{name}={amount}" for name, amount in self.amounts)

    def merged(self, options: Mapping[str, Any]) -> Request:
        """This request with a call's options over it: what is given replaces, named resources one by one."""
        given = _given(options)
        return Request.of({**dict(self.amounts), **given}) if given else self

    @property
    def queue(self) -> str:
        """The queue that a job with this request is in."""
        return next((name.removeprefix(LABEL) for name, _ in self.amounts if _amounts.is_label(name)), DEFAULT_QUEUE)

    def within(self, queue: str) -> Request:
        """The same of a job in this queue."""
        if queue == self.queue:
            return self
        own = {name: amount for name, amount in self.amounts if not _amounts.is_label(name)}
        return Request.of(own if queue == DEFAULT_QUEUE else {**own, LABEL + queue: 1})

    def to_people(self) -> dict[str, int | float]:
        """{"cpus": 4, "memory": 2147483648, "slots": 1}: what Postgres, JSON and pages show."""
        return _amounts.to_people(self.amounts)

    def __str__(self) -> str:
        """In words: "4 CPUs, 2 GiB memory, 1 licence". The one slot is not worth a word; the queue is not told."""
        hidden = (ALONE, CPUS, SLOTS)
        named = [(n, a) for n, a in self.amounts if not (n in hidden or _amounts.is_label(n)) or (n == SLOTS and a > 1)]
        return ", ".join(_amounts.format_amount(n, a) for n, a in [(CPUS, self.get(CPUS)), *named])


def _given(options: Mapping[str, Any]) -> dict[str, int]:
    """The amounts that a person's options set, zeros included."""
    given: dict[str, int] = {}
    if options.get(CPUS) is not None:
        given[CPUS] = _amounts.parse_cpus(options[CPUS])
    if options.get(MEMORY) is not None:
        given[MEMORY] = _amounts.parse_memory(options[MEMORY])
    if options.get(GPUS) is not None:
        given[GPUS] = _amounts.parse_count(options[GPUS], GPUS)
    if options.get("resources") is not None:
        given.update(_amounts.named_resources(options["resources"]))
    return given


@lru_cache(maxsize=4096)
def _from_shape(shape: str) -> Request:
    amounts = []
    for part in shape.split(","):
        name, _, digits = part.partition("=")
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 16):
            right = "It must be like 'cpus=4000,slots=1'."
            raise InvalidRequest(f"shape {show(shape)} is not valid", value=shape, advice=right)
        amounts.append((name, int(digits)))
    return Request(tuple(amounts))
