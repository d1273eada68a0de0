"""Amounts of resources: integers inside (millicores, bytes, counts), floats and text only at this edge.

A vector of amounts is a tuple of (name, amount) pairs sorted by name, without zeros. So equal vectors have one form.
`cpus` is in millicores and `memory` in bytes. Every other amount (`gpus`, `slots`, named resources) is a count.

Every `parse_…` raises `InvalidRequest` with the wrong value and a description of a right one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from numbers import Integral
from typing import Any, NoReturn

from celery_capacity.routing.errors import InvalidRequest, show
from celery_capacity.routing.model.identifiers import check_queue_name, check_resource_name

#: millicores in one CPU; nothing finer can be asked for
MILLICORES = 1000
#: CPUs: the largest number that can be asked for or published
MAX_CPUS = 1_000_000
#: bytes or pieces. Redis computes in doubles, exact up to 2^53, and the sum of two amounts must stay within that.
MAX_AMOUNT = 2**52
#: names in one vector; bounds the comparisons of a script for one candidate
MAX_NAMES = 16

#: Bytes in whose multiples memory is asked for and published: a MiB, or a MB where somebody means powers of 1000.
MEMORY_STEPS = (2**20, 10**6)

CPUS, MEMORY, GPUS, SLOTS = "cpus", "memory", "gpus", "slots"
#: The ledger's own resource: every worker has one, and an attempt that runs alone on its worker holds it. Only the
#: ledger names it.
ALONE = "alone"
#: Queue of a job that names no queue. A shape has no label for it.
DEFAULT_QUEUE = "celery"
#: Prefix of the label of any other queue. A job asks for one piece of the label; a worker that serves the queue has
#: endlessly many. No named resource can have this prefix.
LABEL = "queue:"
#: Amount that a worker publishes if it does not serve the default queue: it takes only jobs with a label.
ONLY_LABELLED = LABEL
#: Amount of each label that a worker publishes: more than can be allocated.
ENDLESS = 10**9
#: labels of one worker; bounds the fields that a script reads of its book
MAX_QUEUES = 100
#: Key in the JSON of a capacity: the queues of a worker that serves others than the default one.
QUEUES = "queues"
#: resources that have their own argument; not allowed as named resources
STANDARD = (CPUS, MEMORY, GPUS, SLOTS)

#: a vector of amounts
Amounts = tuple[tuple[str, int], ...]

# Millicores. Errors of binary sums, as of 0.1 + 0.2, stay far below this, and an amount such as 0.0001 CPUs is far
# above.
_FLOAT_NOISE_MILLICORES = 1e-6

_DECIMAL_TEXT = re.compile(r"[0-9]{1,20}(?:\.[0-9]{1,20})?|\.[0-9]{1,20}")
_COUNT_TEXT = re.compile(r"[0-9]{1,20}")
_MEMORY_TEXT = re.compile(rf"({_DECIMAL_TEXT.pattern})\s*(?:([KMGT])(I?))?B?", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def _refuse(what: str, value: object, why: str, right: str) -> NoReturn:
    raise InvalidRequest(f"{what}={show(value)} {why}", value=value, advice=right)


def _right_cpus(what: str) -> str:
    return f"{what} must be a number from 0 to {MAX_CPUS:,} in steps of 0.001, such as 4 or 0.5."


def _right_memory(what: str) -> str:
    return f"{what} must be whole bytes, such as 2147483648, or text like '512MiB', '2GiB' or '1.5G'."


def _right_count(what: str) -> str:
    return f"{what} must be a whole number from 0 to {MAX_AMOUNT:,}, such as 1."


def _kind(value: object) -> str:
    """Return the reason why a value of the wrong type is refused."""
    if isinstance(value, bool):
        return "is a bool"
    if isinstance(value, (str, bytes)):
        return "is text"
    return f"is of type {type(value).__name__}"


def parse_cpus(value: object, what: str = CPUS) -> int:
    """Return the millicores of a number of CPUs, given as int, float or Decimal.

    Text is refused: "4" from a form or a file is a mistake that a caller should see. A float counts as the multiple of
    0.001 that it is meant to be: 0.1 + 0.2 is 300 millicores.
    """
    if isinstance(value, bool) or not isinstance(value, (Integral, float, Decimal)):
        _refuse(what, value, f"{_kind(value)}, not a number", _right_cpus(what))
    return _millicores(value if isinstance(value, (float, Decimal)) else int(value), value, what)


def parse_cpus_text(text: str, what: str = CPUS) -> int:
    """Return the millicores of CPUs written as text, in the environment or on a command line ("0.5", "72")."""
    if not _DECIMAL_TEXT.fullmatch(text.strip()):
        _refuse(what, text, "is not a number of CPUs", _right_cpus(what))
    return _millicores(Decimal(text.strip()), text, what)


def _millicores(number: float | Decimal, value: object, what: str) -> int:
    """Return `number` CPUs as millicores. Errors show `value`, which is in the person's own words."""
    if (isinstance(number, Decimal) and not number.is_finite()) or (
        isinstance(number, float) and not math.isfinite(number)
    ):
        _refuse(what, value, "is not finite", _right_cpus(what))
    if number < 0:
        _refuse(what, value, "is negative", _right_cpus(what))
    if number > MAX_CPUS:
        _refuse(what, value, f"is above {MAX_CPUS:,}", _right_cpus(what))
    millicores = _decimal_millicores(number) if isinstance(number, Decimal) else _float_millicores(number)
    if millicores is None:
        _refuse(what, value, "is finer than 0.001", _right_cpus(what))
    return millicores


def _float_millicores(number: float) -> int | None:
    nearest = round(number * MILLICORES)
    exact_enough = abs(number * MILLICORES - nearest) <= _FLOAT_NOISE_MILLICORES
    return nearest if exact_enough and (nearest > 0 or number == 0) else None


def _decimal_millicores(number: Decimal) -> int | None:
    """Return exact millicores under any decimal context of the caller; None where the number is finer than one."""
    _, digits, exponent = number.as_tuple()
    assert isinstance(exponent, int), "only finite numbers come here"
    while digits and digits[-1] == 0:
        digits, exponent = digits[:-1], exponent + 1
    if not digits:
        return 0
    return None if exponent < -3 else int("".join(map(str, digits))) * int(10 ** (exponent + 3))


def parse_memory(value: object, what: str = MEMORY) -> int:
    """Return memory in bytes, from whole bytes or from text with a unit.

    K M G T are powers of 1000, and KiB MiB GiB TiB are powers of 1024. The "B" is optional, and capitals do not matter.
    A fraction of a byte ("1.1GiB") is rounded up: no job gets less than it asked for.
    """
    if isinstance(value, str):
        match = _MEMORY_TEXT.fullmatch(value.strip())
        if match is None:
            _refuse(what, value, "is not an amount of memory", _right_memory(what))
        number, prefix, binary = match.groups()
        power = _POWERS[prefix.upper()] if prefix else 0
        whole, _, fraction = number.partition(".")
        scale = 10 ** len(fraction)
        unit = (1024 if binary else 1000) ** power
        size: int = -(-int(whole + fraction) * unit // scale)
    elif isinstance(value, bool) or not isinstance(value, Integral):
        _refuse(what, value, f"{_kind(value)}, not whole bytes", _right_memory(what))
    else:
        size = int(value)
    if size < 0:
        _refuse(what, value, "is negative", _right_memory(what))
    if size > MAX_AMOUNT:
        _refuse(what, value, f"is above {format_memory(MAX_AMOUNT)}", _right_memory(what))
    return size


def memory_to_ask(size: int) -> int:
    """Return the memory that a job asks for: whole MiB or MB as they are, all else rounded up to the next MiB.

    Each different request has a place of its own in the ledger. Computed amounts would make places without end.
    """
    return size if _is_whole(size) else -(-size // MEMORY_STEPS[0]) * MEMORY_STEPS[0]


def memory_to_publish(size: int) -> int:
    """Return the memory that a worker publishes of its machine: whole MiB or MB as they are, all else rounded down.

    So a job can ask for just as much. Less than a MiB stays as it is.
    """
    return size if _is_whole(size) or size < MEMORY_STEPS[0] else size // MEMORY_STEPS[0] * MEMORY_STEPS[0]


def _is_whole(size: int) -> bool:
    return any(size % step == 0 for step in MEMORY_STEPS)


def parse_count(value: object, what: str) -> int:
    """Return a count of pieces (gpus, slots, a named resource), given as int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        _refuse(what, value, f"{_kind(value)}, not a whole number", _right_count(what))
    count = int(value)
    if count < 0:
        _refuse(what, value, "is negative", _right_count(what))
    if count > MAX_AMOUNT:
        _refuse(what, value, f"is above {MAX_AMOUNT:,}", _right_count(what))
    return count


def parse_count_text(text: str, what: str) -> int:
    """Return a count written as text, in the environment or on a command line."""
    if not _COUNT_TEXT.fullmatch(text.strip()):
        _refuse(what, text, "is not a whole number", _right_count(what))
    return parse_count(int(text), what)


def format_cpus(millicores: int) -> str:
    """Return millicores as a decimal number of CPUs without superfluous zeros: "72", "0.5", "0"."""
    sign = "-" if millicores < 0 else ""
    whole, rest = divmod(abs(millicores), MILLICORES)
    return f"{sign}{whole}" + (f".{rest:03d}".rstrip("0") if rest else "")


def cpus_number(millicores: int) -> int | float:
    """Return millicores as the number of CPUs that JSON shows: 72, 0.5, 0."""
    whole, rest = divmod(millicores, MILLICORES)
    return millicores / MILLICORES if rest else whole


def format_memory(size: int) -> str:
    """Return bytes for people, in powers of 1024, rounded to one decimal: "2 GiB", "1.5 GiB", "0 B"."""
    sign, rest = ("-", -size) if size < 0 else ("", size)
    power = 0
    while power + 1 < len(_BINARY_UNITS) and rest >= 1024 ** (power + 1):
        power += 1
    tenths = (rest * 10 + 1024**power // 2) // 1024**power
    whole, tenth = divmod(tenths, 10)
    return f"{sign}{whole}" + (f".{tenth}" if tenth else "") + f" {_BINARY_UNITS[power]}"


def format_amount(name: str, amount: int) -> str:
    """Return an amount in words: "4 CPUs", "2 GiB memory", "1 gpu"; a named resource has its own name."""
    if name == CPUS:
        return f"{format_cpus(amount)} {'CPU' if amount == MILLICORES else 'CPUs'}"
    if name == MEMORY:
        return f"{format_memory(amount)} memory"
    if name in (GPUS, SLOTS):
        return f"{amount} {name[:-1] if amount == 1 else name}"
    return f"{amount} {name}"


def canonical(amounts: Mapping[str, int] | Iterable[tuple[str, int]]) -> Amounts:
    """Return the one form of a vector: names checked, zeros dropped, sorted by name.

    Raises `InvalidRequest` for more than `MAX_NAMES` resources, or for more than `MAX_QUEUES` labels.
    """
    by_name = dict(amounts)
    kept = []
    for name in sorted(map(_check_name, by_name)):
        amount = by_name[name]
        if type(amount) is not int or not 0 <= amount <= MAX_AMOUNT:  # the rule of parse_count, at less cost
            amount = parse_count(amount, name)
        if amount:
            kept.append((name, amount))
    if len(kept) > MAX_NAMES:
        named = [name for name, _ in kept if not is_label(name)]
        if len(named) > MAX_NAMES:
            raise InvalidRequest(
                f"{len(named)} resources are too many",
                value=named,
                advice=f"At most {MAX_NAMES} may be named, {', '.join(STANDARD)} included.",
            )
        if len(kept) - len(named) > MAX_QUEUES:
            raise InvalidRequest(
                f"{len(kept) - len(named)} queues are too many for one worker",
                advice=f"It may serve {MAX_QUEUES}: name fewer with -Q, or start more workers.",
            )
    return tuple(kept)


def is_label(name: str) -> bool:
    """Return True for the name of a label, which tells the queues of a worker or the queue of a job."""
    return name.startswith(LABEL)


def has_index(name: str) -> bool:
    """Return True for the name of a resource that not every worker has.

    The ledger keeps an index of the workers that have it, and one of the waiting shapes that ask for it.
    """
    return name not in (CPUS, MEMORY, SLOTS, ALONE, ONLY_LABELLED)


def is_named(name: str) -> bool:
    """Return True for a resource that a worker may have or not, such as GPUs and licences."""
    return has_index(name) and not is_label(name)


def _check_name(name: object) -> str:
    if isinstance(name, str) and name.startswith(LABEL):
        if name != ONLY_LABELLED:
            check_queue_name(name.removeprefix(LABEL))
        return name
    return check_resource_name(name)


def labels(queues: Iterable[str]) -> dict[str, int]:
    """Return the labels that a worker of these queues publishes; nothing for the default queue alone."""
    named = {check_queue_name(queue) for queue in queues}
    labelled = {LABEL + queue: ENDLESS for queue in named if queue != DEFAULT_QUEUE}
    return labelled if DEFAULT_QUEUE in named else {**labelled, ONLY_LABELLED: 1}


def queues_of(amounts: Iterable[str]) -> list[str]:
    """Return the sorted queues of a worker that publishes these names, or of a job that asks for them."""
    names = set(amounts)
    labelled = [name.removeprefix(LABEL) for name in names if is_label(name) and name != ONLY_LABELLED]
    return sorted(labelled if ONLY_LABELLED in names else [*labelled, DEFAULT_QUEUE])


def to_people(amounts: Amounts) -> dict[str, int | float]:
    """Return a vector in the units of people, standard resources first.

    CPUs are a number, also where they are 0. Memory is in bytes, all other amounts are counts. Queues are left out.
    """
    by_name = dict(amounts)
    people: dict[str, int | float] = {CPUS: cpus_number(by_name.get(CPUS, 0))}
    people.update((name, by_name[name]) for name in STANDARD[1:] if name in by_name)
    people.update((name, amount) for name, amount in amounts if name not in (*STANDARD, ALONE) and not is_label(name))
    return people


def from_people(mapping: Mapping[str, Any]) -> dict[str, int]:
    """Read a mapping of `to_people` back into name → millicores, bytes or count. Not yet canonical."""
    parsers = {CPUS: parse_cpus, MEMORY: parse_memory}
    parsed = {
        name: parsers.get(name, parse_count)(value, str(name)) for name, value in mapping.items() if name != QUEUES
    }
    return {**parsed, **labels(mapping[QUEUES])} if QUEUES in mapping else parsed


def named_resources(value: object, what: str = "resources") -> dict[str, int]:
    """Return the checked names → counts of `resources={"licence": 1}`; a standard resource is refused."""
    if not isinstance(value, Mapping):
        _refuse(what, value, f"{_kind(value)}, not a mapping", f"{what} must be like {{'licence': 1}}.")
    checked = {}
    for name, count in value.items():
        checked_name = refuse_standard(check_resource_name(name, f"{what}: name"), what)
        checked[checked_name] = parse_count(count, f"{what}[{name!r}]")
    return checked


def refuse_standard(name: str, what: str) -> str:
    """Return the name, unless it may not stand among the named resources.

    Raises `InvalidRequest` for a standard resource, and for a name of the ledger's own.
    """
    if name in (ALONE, QUEUES):
        raise InvalidRequest(
            f"{what} names {name!r}, which the platform uses itself",
            value=name,
            advice="Give the resource another name.",
        )
    if name in STANDARD:
        instead = "every job takes one slot" if name == SLOTS else f"{name} has a setting of its own"
        raise InvalidRequest(
            f"{what} names {name!r}, which is not a named resource",
            value=name,
            advice=f"Leave it out: {instead}.",
        )
    return name


def add_up(vectors: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sums of amounts, by name."""
    sums: dict[str, int] = {}
    for vector in vectors:
        for name, amount in vector.items():
            sums[name] = sums.get(name, 0) + amount
    return sums
