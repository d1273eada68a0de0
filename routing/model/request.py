"""A job's request: a vector of amounts that a worker must have free, all at once.

A request is immutable and has one form for equal needs. The text of that form (`shape`) names the set of waiting jobs
with the request in the ledger.

A shape may go on with a *suffix*: what a job needs beside amounts, and its run time. Jobs that differ in it wait in
queues of their own. The suffix is a list of terms, each with a comma and the sign of its kind before it, in the order
of `SIGNS`, and the run time behind them: `cpus=4000,slots=1,$physics,^3896794,~688862`. A term has no comma, no equals
sign and no sign of another term, so neither an amount nor a task is taken for one.

A job may have *alternatives*: requests in order, of which one is enough. Their term lists all of them, with `!` and `;`
for the characters of amounts: `cpus=1000,gpus=1,slots=1,|cpus!1000;gpus!1;slots!1|cpus!32000;slots!1`. So such jobs
wait in one queue. The amounts of a waiting shape are those of the first alternative. The shape of a job that holds an
alternative has its amounts, and its number before the list: `cpus=32000,slots=1,|2|cpus!1000;…`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple
from urllib.parse import quote

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
from celery_capacity.routing.model.expected import EXPECTED, UNKNOWN, RunTime, expected_class
from celery_capacity.routing.model.message import PLATFORM_PREFIX

#: Beginnings of the names of tasks that every worker knows.
KNOWN_EVERYWHERE: Final = ("celery.", PLATFORM_PREFIX)
_SAFE: Final = "._-:/@"
_UNSAFE: Final = re.compile(rf"[^\w{re.escape(_SAFE)}]", re.ASCII)

#: Signs of the terms in a suffix, in the order in which they stand.
SIGNS: Final = "|?+$"
#: Sign of the alternatives, which also stands between them.
ALTERNATIVE_SIGN: Final = "|"
#: Most alternatives of a job. Each may cost a search.
MAX_ALTERNATIVES: Final = 4
_ALTERNATIVES: Final = re.compile(r",\|(?:(\d)\|)?([^,]+)", re.ASCII)
_WRITTEN: Final = str.maketrans("=,", "!;")
_READ: Final = str.maketrans("!;", "=,")
_SUFFIX: Final = re.compile(rf",[{re.escape(SIGNS)}^~].*\Z", re.ASCII)
_TIMES: Final = re.compile(r"(?:,\^(\d{1,12}))?,~(\d{1,12})\Z", re.ASCII)

#: option of a task and a call, and key of the platform's header: the tenant of the job
TENANT: Final = "tenant"
#: options of a request that `@app.task(…)` and `apply_async(…)` accept
REQUEST_OPTIONS = (CPUS, MEMORY, GPUS, "resources")
#: options of a task, a call and a rule that say where a job may run
PLACE_OPTIONS = ("where", "worker", "exclusive", "placement")
#: option of a task, a call and a rule: alternatives in order, each with some of the options of a request
REQUESTS: Final = "requests"
#: all of these, the expected run time and the tenant
CALL_OPTIONS = (*REQUEST_OPTIONS, REQUESTS, EXPECTED, TENANT, *PLACE_OPTIONS)


@dataclass(frozen=True, slots=True)
class Request:
    """A job's request. `amounts`: (name, millicores | bytes | count) sorted by name, without zeros.

    `slots` is always there. Make a request with `from_options`, `from_people`, `from_shape` or `of`. The constructor
    takes the canonical form only, and raises `InvalidRequest` otherwise.
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
    def of(cls, amounts: Mapping[str, int]) -> Request:
        """Make a request from internal units (millicores, bytes, counts); one slot where none is named."""
        return cls(_amounts.canonical({SLOTS: 1, **amounts}))

    @classmethod
    def from_options(cls, options: Mapping[str, Any], default_cpus: int) -> Request:
        """Make a request from a person's options: `cpus`, `memory`, `gpus`, `resources`. Others are ignored.

        Memory is rounded up, as `memory_to_ask` says. None counts as not given. `default_cpus`: millicores where
        `cpus` is not given.
        """
        return cls.of({CPUS: default_cpus, **_given(options)})

    @classmethod
    def from_people(cls, mapping: Mapping[str, Any]) -> Request:
        """Make a request from the JSON that `to_people` makes; missing `cpus` are 0."""
        return cls.of(_amounts.from_people(mapping))

    @classmethod
    def from_shape(cls, shape: str) -> Request:
        """Make a request from the text that `shape` makes; other texts of an equal request are refused.

        The task and the run time of a filed shape are left out.
        """
        return _from_shape(split_shape(shape)[0])

    def get(self, name: str) -> int:
        """Return the amount of one resource; 0 where it is not asked for."""
        for asked, amount in self.amounts:
            if asked == name:
                return amount
        return 0

    @property
    def shape(self) -> str:
        """Return the canonical text, such as `cpus=4000,memory=2147483648,slots=1`."""
        return ",".join(f"{name}={amount}" for name, amount in self.amounts)

    def merged(self, options: Mapping[str, Any]) -> Request:
        """Return this request with a call's options over it: each of them replaces the amount of its name."""
        changes = _given(options)
        return Request.of({**dict(self.amounts), **changes}) if changes else self

    @property
    def queue(self) -> str:
        """Return the queue that a job with this request is in: `celery` for a request without a label."""
        return next((name.removeprefix(LABEL) for name, _ in self.amounts if _amounts.is_label(name)), DEFAULT_QUEUE)

    def within(self, queue: str) -> Request:
        """Return this request for a job in `queue`."""
        if queue == self.queue:
            return self
        resources = {name: amount for name, amount in self.amounts if not _amounts.is_label(name)}
        return Request.of(resources if queue == DEFAULT_QUEUE else {**resources, LABEL + queue: 1})

    def to_people(self) -> dict[str, int | float]:
        """Return `{"cpus": 4, "memory": 2147483648, "slots": 1}`: the form that Postgres, JSON and pages show."""
        return _amounts.to_people(self.amounts)

    def __str__(self) -> str:
        """Return the request in words: "4 CPUs, 2 GiB memory, 1 licence".

        A single slot is not worth a word, and the queue is not told.
        """
        hidden = (ALONE, CPUS, SLOTS)
        named = [(n, a) for n, a in self.amounts if not (n in hidden or _amounts.is_label(n)) or (n == SLOTS and a > 1)]
        return ", ".join(_amounts.format_amount(n, a) for n, a in [(CPUS, self.get(CPUS)), *named])


class FiledShape(NamedTuple):
    """Parts of a filed shape: its request, its task and its suffix.

    `task`: as `task_text` wrote it; "" where any worker may take it. `suffix`: as `split_suffix` returns it.
    """

    request: str
    task: str
    suffix: str


def filed_shape(shape: str, task: str) -> str:
    """Return the text under which the ledger files a job: its request, its task, and its suffix behind them.

    As in "cpus=4000,slots=1,tasks.render,~655360". A worker takes a job of this shape only if it has registered the
    task. A task that every worker knows is left out.
    """
    if not task or task.startswith(KNOWN_EVERYWHERE):
        return shape
    request, suffix = split_suffix(shape)
    return f"{request},{task_text(task)}{suffix}"


def task_text(task: str) -> str:
    """Return a task's name as it stands in keys of the ledger: in ASCII, without the characters of a shape.

    No name looks like an amount or a term there.
    """
    return quote(task, safe=_SAFE).replace("~", "%7E") if _UNSAFE.search(task) else task


def split_shape(filed: str) -> FiledShape:
    """Return the parts of a filed shape."""
    shape, suffix = split_suffix(filed)
    request, _, last = shape.rpartition(",")
    return FiledShape(shape, "", suffix) if "=" in last else FiledShape(request, last, suffix)


def with_request(filed: str, request: Request) -> str:
    """Return a filed shape with another request. Its task and its suffix stay."""
    parts = split_shape(filed)
    return ",".join(filter(None, (request.shape, parts.task))) + parts.suffix


# -- the suffix --------------------------------------------------------------------------------------------------------


def split_suffix(shape: str) -> tuple[str, str]:
    """Return a shape without its suffix, and the suffix with its comma; "" where the shape has none."""
    match = _SUFFIX.search(shape)
    return (shape, "") if match is None else (shape[: match.start()], match[0])


def term_text(text: str) -> str:
    """Return a text as it stands in a term: in ASCII, without the characters of a shape."""
    return quote(text, safe=_SAFE).replace("~", "%7E")


def terms_of(shape: str) -> str:
    """Return the terms in the suffix of a shape, each with its comma, without the run time."""
    suffix = split_suffix(shape)[1]
    match = _TIMES.search(suffix)
    return suffix if match is None else suffix[: match.start()]


def term_of(shape: str, sign: str) -> str:
    """Return the term of one kind in a shape, without its sign, as `term_text` wrote it; "" where it has none."""
    terms = terms_of(shape).split(",")
    return next((term.removeprefix(sign) for term in terms if term.startswith(sign)), "")


def timed(shape: str, run_time: RunTime) -> str:
    """Return a shape with the classes of a run time: `cpus=4000,slots=1,~655360`, and `^` before a longer bound.

    The shape of a job with an unknown time stays as it is.
    """
    expected, bound = expected_class(run_time.expected), expected_class(run_time.bound)
    if not expected:
        return shape
    return f"{shape},~{expected}" if bound == expected else f"{shape},^{bound},~{expected}"


def run_time_of(shape: str) -> RunTime:
    """Return the classes of the run time in a shape."""
    match = _TIMES.search(shape) if "~" in shape else None
    return UNKNOWN if match is None else RunTime(int(match[2]), int(match[1] or match[2]))


# -- alternatives ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def alternatives_of(shape: str) -> tuple[Request, ...]:
    """Return the requests of which a job with this shape, or with these terms, needs one, in order.

    Without a term there is only the request of the shape. Where that one runs alone, all do: it is the last attempt.
    Raises `InvalidRequest`.
    """
    match = _ALTERNATIVES.search(shape) if ",|" in shape else None
    if match is None:
        return (Request.from_shape(shape),)
    listed = match[2].split(ALTERNATIVE_SIGN)
    requests = tuple(_from_shape(text.translate(_READ)) for text in listed)
    is_alone = Request.from_shape(shape).get(ALONE) if "=" in shape else 0
    return tuple(Request.of({**dict(asked.amounts), ALONE: 1}) if is_alone else asked for asked in requests)


def alternatives_term(requests: Sequence[Request]) -> str:
    """Return the term of alternatives, with its comma; "" where there is only one request."""
    if len(requests) < 2:
        return ""
    return "," + "".join(ALTERNATIVE_SIGN + request.shape.translate(_WRITTEN) for request in requests)


def alternatives_to_show(shape: str) -> tuple[Request, ...]:
    """Return the alternatives of a shape under which a job waits; none where it has one request, or holds one."""
    return alternatives_of(shape) if ",|" in shape and not number_held(shape) else ()


def alternatives_text(requests: Sequence[Request]) -> str:
    """Return alternatives in words: "1 CPU, 1 gpu, or 32 CPUs"."""
    return ", or ".join(map(str, requests))


def number_held(shape: str) -> int:
    """Return the number of the alternative that the job of a shape holds, from 1; 0 where it holds none."""
    match = _ALTERNATIVES.search(shape) if ",|" in shape else None
    return int(match[1] or 0) if match is not None else 0


def holding(shape: str, number: int) -> str:
    """Return the shape of a job that holds one of its alternatives, by its number; 0 returns the shape it waits under.

    A shape without alternatives, or with fewer, stays as it is.
    """
    match = _ALTERNATIVES.search(shape) if ",|" in shape else None
    if match is None or number > len(requests := alternatives_of(shape)):
        return shape
    term = f",{ALTERNATIVE_SIGN}{number}{ALTERNATIVE_SIGN}{match[2]}" if number else f",{ALTERNATIVE_SIGN}{match[2]}"
    held = with_request(shape, requests[max(0, number - 1)])
    return held.replace(match[0], term, 1)


def check_alternatives(shape: str) -> tuple[Request, ...]:
    """Return the alternatives of a shape that a message brought. Raises `InvalidRequest` for a wrong term.

    A message may come from anybody, and its shape becomes a part of keys.
    """
    requests = alternatives_of(shape)
    if ",|" in shape:
        queues = {request.queue for request in requests}
        term = term_of(shape, ALTERNATIVE_SIGN).removeprefix(f"{number_held(shape)}{ALTERNATIVE_SIGN}")
        canonical = alternatives_term(requests).removeprefix(f",{ALTERNATIVE_SIGN}")
        if term != canonical or len(set(requests)) < len(requests) or len(queues) > 1:
            advice = "Give `requests` to apply_async, and leave the header as it is."
            raise InvalidRequest(f"shape {show(shape)} has no valid alternatives", value=shape, advice=advice)
        _check_number(len(requests))
    return requests


def alternatives_from(options: Mapping[str, Any], base: Sequence[Request], common: Request) -> tuple[Request, ...]:
    """Return the alternatives of a task or a call, with its options over those of the sources behind it.

    `base`: those of the sources behind. `common`: their amounts without alternatives. `requests` in the options
    replaces the alternatives. All other amounts there go into each alternative. Raises `InvalidRequest`.
    """
    listed = options.get(REQUESTS)
    if listed is None:
        return tuple(dict.fromkeys(request.merged(options) for request in base))
    if not isinstance(listed, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in listed):
        raise InvalidRequest(f"requests={show(listed)} is not valid", value=listed, advice=_ALTERNATIVES_RULE)
    _check_number(len(listed))
    strange = sorted({str(name) for entry in listed for name in entry if name not in REQUEST_OPTIONS})
    if strange:
        advice = f"There are {', '.join(REQUEST_OPTIONS)}. All other options hold for each alternative."
        raise InvalidRequest(f"requests: {show(strange[0])} is not known", value=strange[0], advice=advice)
    common = common.merged(options)
    return tuple(dict.fromkeys(common.merged(entry) for entry in listed))


_ALTERNATIVES_RULE: Final = 'It must be a list such as [{"gpus": 1}, {"cpus": 32}].'


def _check_number(number: int) -> None:
    if not 1 <= number <= MAX_ALTERNATIVES:
        raise InvalidRequest(
            f"requests has {number} alternatives", value=number, advice=f"There may be 1 to {MAX_ALTERNATIVES} of them."
        )


# -- from options ------------------------------------------------------------------------------------------------------


def _given(options: Mapping[str, Any]) -> dict[str, int]:
    """Return the amounts that a person's options set, zeros included."""
    amounts: dict[str, int] = {}
    if options.get(CPUS) is not None:
        amounts[CPUS] = _amounts.parse_cpus(options[CPUS])
    if options.get(MEMORY) is not None:
        amounts[MEMORY] = _amounts.memory_to_ask(_amounts.parse_memory(options[MEMORY]))
    if options.get(GPUS) is not None:
        amounts[GPUS] = _amounts.parse_count(options[GPUS], GPUS)
    if options.get("resources") is not None:
        amounts.update(_amounts.named_resources(options["resources"]))
    return amounts


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
