"""Where a job may run: conditions on the labels of workers, one worker by its name, alone, packed or spread.

A worker publishes labels (`PLATFORM_LABELS=arch=aarch64,disk=ssd`). A job asks for a *place* by the options of its
task, its call or a rule. The place is written into the job's shape as terms, so that jobs with different places wait in
queues of their own:

- `?@node-7/arch:in:aarch64/mem:ge:64`: the worker's name, and conditions in the order of their keys. Each condition has
  a key, an operator and values. The values of `in` and `not` are sorted. Equality is `in` with one value.
- `+exclusive`, `+spread` or `+exclusive:spread`. The request of an exclusive job also asks for `alone`. The term tells
  it from a last attempt, which asks for `alone` too, though its job does not.

Only characters stand there that a shape does not use itself. `allows` in lua/lib/labels.lua reads the same text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple

from celery_capacity.routing.errors import InvalidRequest, show
from celery_capacity.routing.model.amounts import ALONE
from celery_capacity.routing.model.identifiers import check_worker_name
from celery_capacity.routing.model.request import PLACE_OPTIONS, Request, alternatives_term, term_of, terms_of

PACK: Final = "pack"
SPREAD: Final = "spread"
PLACEMENTS: Final = (PACK, SPREAD)
EXCLUSIVE: Final = "exclusive"
#: Signs of the terms, see `routing.model.request.SIGNS`.
WHERE_SIGN: Final = "?"
PLACEMENT_SIGN: Final = "+"
#: Most labels of a worker, conditions of a job, and values of a condition. They bound books and keys.
MAX_LABELS: Final = 32
MAX_CONDITIONS: Final = 16
MAX_VALUES: Final = 16

_KEY: Final = re.compile(r"[a-z0-9._-]{1,63}", re.ASCII)
_VALUE: Final = re.compile(r"[A-Za-z0-9._-]{1,63}", re.ASCII)
#: Values that compare as numbers. The scripts know the same ones.
_NUMBER: Final = re.compile(r"-?[0-9]+\.?[0-9]*", re.ASCII)
_KEY_RULE: Final = "A label's key is 1 to 63 characters of a-z 0-9 . _ - such as 'arch'."
_VALUE_RULE: Final = "A label's value is 1 to 63 characters of A-Z a-z 0-9 . _ - such as 'aarch64'."
_FORMS: Final = "Write a value, a list of values, or a text like '!=x86', 'in a,b' or '>=2'."
#: Signs that people write before a value -> operators. The longer signs come first.
_OPERATORS: Final = {"!=": "not", ">=": "ge", "<=": "le", "==": "in", ">": "gt", "<": "lt", "=": "in"}
_WRITTEN: Final = {"not": "!=", "ge": ">=", "le": "<=", "gt": ">", "lt": "<"}
_COMPARE: Final = {
    "ge": lambda value, asked: value >= asked,
    "gt": lambda value, asked: value > asked,
    "le": lambda value, asked: value <= asked,
    "lt": lambda value, asked: value < asked,
}


class Condition(NamedTuple):
    """Condition on the label `key` of a worker. `operator`: in, not, ge, gt, le or lt; `values`: sorted."""

    key: str
    operator: str
    values: tuple[str, ...]

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Return True if labels meet the condition. Without the label only `not` holds."""
        value = labels.get(self.key)
        if self.operator in ("in", "not"):
            return (value in self.values) == (self.operator == "in")
        if value is None or not _NUMBER.fullmatch(value):
            return False
        return bool(_COMPARE[self.operator](float(value), float(self.values[0])))

    @property
    def term(self) -> str:
        return ":".join((self.key, self.operator, *self.values))

    def __str__(self) -> str:
        """Return the condition as people write it: "arch=aarch64", "disk in nvme,ssd", "mem>=64"."""
        if self.operator == "in" and len(self.values) > 1:
            return f"{self.key} in {','.join(self.values)}"
        return f"{self.key}{_WRITTEN.get(self.operator, '=')}{','.join(self.values)}"


class Place(NamedTuple):
    """Place that a job asks for. None: not said, so that `over` asks the next source.

    `where`: conditions in the order of their keys. `worker`: the only worker, "" for any.
    """

    where: tuple[Condition, ...] | None = None
    worker: str | None = None
    exclusive: bool | None = None
    spread: bool | None = None

    def over(self, other: Place) -> Place:
        """Return this place, with the parts of the other where this one does not say."""
        return Place(
            other.where if self.where is None else self.where,
            other.worker if self.worker is None else self.worker,
            other.exclusive if self.exclusive is None else self.exclusive,
            other.spread if self.spread is None else self.spread,
        )

    @property
    def terms(self) -> str:
        """Return the terms of the place in a shape, each with its comma; "" where any worker will do."""
        conditions = [f"@{self.worker}"] if self.worker else []
        conditions += [condition.term for condition in self.where or ()]
        kinds = [name for name, is_asked in ((EXCLUSIVE, self.exclusive), (SPREAD, self.spread)) if is_asked]
        where = f",{WHERE_SIGN}{'/'.join(conditions)}" if conditions else ""
        return f"{where},{PLACEMENT_SIGN}{':'.join(kinds)}" if kinds else where

    def shape(self, *requests: Request) -> str:
        """Return the shape of a request at this place, or of several alternatives."""
        asked = [
            Request.of({**dict(request.amounts), ALONE: int(bool(self.exclusive))})
            if bool(request.get(ALONE)) != bool(self.exclusive)
            else request
            for request in requests
        ]
        return asked[0].shape + alternatives_term(asked) + self.terms

    def __str__(self) -> str:
        """Return the place in words: "arch=aarch64, on worker node-7"."""
        named = [f"on worker {self.worker}"] if self.worker else []
        return ", ".join([*map(str, self.where or ()), *named])


ANYWHERE: Final = Place()


# -- from people -------------------------------------------------------------------------------------------------------


def place_of_options(options: Mapping[str, Any]) -> Place:
    """Return the place that options say; an option that is missing or None says nothing. Raises `InvalidRequest`."""
    where, worker, exclusive, placement = (options.get(name) for name in PLACE_OPTIONS)
    if exclusive is not None and not isinstance(exclusive, bool):
        raise InvalidRequest(
            f"exclusive={show(exclusive)} is not valid", value=exclusive, advice="It must be True or False."
        )
    return Place(
        None if where is None else parse_where(where),
        None if worker is None else "" if worker == "" else check_worker_name(worker, "worker="),
        exclusive,
        None if placement is None else parse_placement(placement) == SPREAD,
    )


def parse_placement(value: Any, what: str = "placement") -> str:
    """Return `pack` or `spread`. Raises `InvalidRequest` for other values."""
    if value in PLACEMENTS:
        return str(value)
    raise InvalidRequest(f"{what}={show(value)} is not valid", value=value, advice="It must be 'pack' or 'spread'.")


def parse_where(where: Any) -> tuple[Condition, ...]:
    """Return the conditions of a mapping of keys to values, in the order of the keys. Raises `InvalidRequest`."""
    if not isinstance(where, Mapping):
        raise InvalidRequest(
            f"where={show(where)} is not valid", value=where, advice='It must be like {"arch": "aarch64"}.'
        )
    if len(where) > MAX_CONDITIONS:
        raise InvalidRequest(
            f"where has {len(where)} conditions", value=len(where), advice=f"There may be {MAX_CONDITIONS} of them."
        )
    return tuple(sorted(_condition(key, value) for key, value in where.items()))


def _condition(key: Any, value: Any) -> Condition:
    check_key(key)
    if isinstance(value, (list, tuple, set, frozenset)):
        return _checked(key, "in", list(value), value)
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("in "):
            return _checked(key, "in", text[3:].split(","), value)
        sign = next((sign for sign in _OPERATORS if text.startswith(sign)), "")
        operator, rest = _OPERATORS.get(sign, "in"), text.removeprefix(sign)
        return _checked(key, operator, rest.split(",") if operator == "not" else [rest], value)
    return _checked(key, "in", [value], value)


def _checked(key: str, operator: str, values: list[Any], written: Any) -> Condition:
    texts = [_value_text(value) for value in values]
    what = f"where: {key} {show(written)}"
    if not texts or not all(_VALUE.fullmatch(text) for text in texts):
        raise InvalidRequest(f"{what} is not valid", value=written, advice=f"{_FORMS} {_VALUE_RULE}")
    if operator in _COMPARE and not _NUMBER.fullmatch(texts[0]):
        raise InvalidRequest(f"{what} compares with no number", value=written, advice="Write a number, like '>=2'.")
    if len(set(texts)) > MAX_VALUES:
        raise InvalidRequest(
            f"{what} has {len(set(texts))} values", value=written, advice=f"There may be {MAX_VALUES} of them."
        )
    return Condition(key, operator, tuple(sorted(set(texts))))


def _value_text(value: Any) -> str:
    """Return a value as text; "", which no label has, for a value that is neither a text nor a number."""
    if isinstance(value, str):
        return value.strip()
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else ""


def check_key(key: Any) -> str:
    """Return the key of a label. Raises `InvalidRequest`."""
    if isinstance(key, str) and _KEY.fullmatch(key):
        return key
    raise InvalidRequest(f"label {show(key)} is not valid", value=key, advice=_KEY_RULE)


def split_condition(text: str, what: str) -> tuple[str, str]:
    """Return key and value of a condition in one text: "arch=aarch64", "mem>=64", "disk in ssd,nvme"."""
    match = re.fullmatch(r"\s*([^\s=!<>]+)\s*((?:[=!<>]|in\s).*)", text)
    if match is None:
        raise InvalidRequest(
            f"{what} {show(text)} is not valid",
            value=text,
            advice="It must be like arch=aarch64, 'disk!=hdd', 'mem>=64' or 'disk in ssd,nvme'.",
        )
    return match[1], match[2]


# -- labels of workers -------------------------------------------------------------------------------------------------


def parse_labels(text: str, what: str) -> dict[str, str]:
    """Return labels from `key=value` separated by commas, by key. Raises `InvalidRequest`."""
    labels: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            raise InvalidRequest(
                f"{what}={show(text)}: {show(part)} is no label",
                value=part,
                advice=f"It must be like arch=aarch64,disk=ssd. {_KEY_RULE} {_VALUE_RULE}",
            )
        if key in labels:
            raise InvalidRequest(
                f"{what}={show(text)}: {key} stands there twice", value=key, advice="Give each label one value."
            )
        labels[key] = value
    if len(labels) > MAX_LABELS:
        raise InvalidRequest(
            f"{what} has {len(labels)} labels", value=len(labels), advice=f"There may be {MAX_LABELS} of them."
        )
    return dict(sorted(labels.items()))


def labels_text(labels: Mapping[str, str]) -> str:
    """Return labels as a book has them: `arch=aarch64,disk=ssd`, by key."""
    return ",".join(f"{key}={labels[key]}" for key in sorted(labels))


def labels_of_text(text: str) -> dict[str, str]:
    """Return the labels that a book has."""
    return dict(part.split("=", 1) for part in text.split(",") if part)


# -- from shapes -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def place_of(shape: str) -> Place:
    """Return the place in a shape, or in its terms; each part of it is said. Raises `InvalidRequest` for a wrong one.

    A message may come from anybody, and its shape becomes a part of keys.
    """
    where, kinds = term_of(shape, WHERE_SIGN), term_of(shape, PLACEMENT_SIGN)
    parts = where.split("/") if where else []
    worker = parts.pop(0)[1:] if parts and parts[0].startswith("@") else ""
    try:
        conditions = tuple(sorted(_condition_of(part) for part in parts))
    except ValueError as error:
        raise _invalid(shape) from error
    location = Place(
        conditions,
        check_worker_name(worker) if worker else "",
        EXCLUSIVE in kinds.split(":"),
        SPREAD in kinds.split(":"),
    )
    if location.terms != "".join(f",{term}" for term in terms_of(shape).split(",") if term[:1] in ("?", "+")):
        raise _invalid(shape)
    return location


def _condition_of(text: str) -> Condition:
    key, operator, *values = text.split(":")
    if operator not in ("in", "not", *_COMPARE) or (operator in _COMPARE and len(values) != 1):
        raise ValueError(operator)
    return _checked(check_key(key), operator, list(values), text)


def _invalid(shape: str) -> InvalidRequest:
    return InvalidRequest(
        f"shape {show(shape)} has no valid place",
        value=shape,
        advice="Give `where`, `worker`, `exclusive` or `placement` to apply_async, and leave the header as it is.",
    )


def is_exclusive(shape: str) -> bool:
    """Return True if the job of a shape itself asks to run alone, and not only its last attempt."""
    return f",{PLACEMENT_SIGN}{EXCLUSIVE}" in shape


def is_spread(shape: str) -> bool:
    """Return True if the jobs of a shape, or of these terms, go where most CPUs are free."""
    return f",{PLACEMENT_SIGN}" in shape and place_of(shape).spread is True


def named_worker(terms: str) -> str:
    """Return the only worker that the jobs of these terms may run on; "" for any."""
    return place_of(terms).worker or "" if f",{WHERE_SIGN}@" in terms else ""


def allows(terms: str, worker: str, labels: Mapping[str, str]) -> bool:
    """Return True if jobs with these terms may run on a worker with this name and these labels."""
    if f",{WHERE_SIGN}" not in terms:
        return True
    location = place_of(terms)
    return location.worker in ("", worker) and all(condition.holds(labels) for condition in location.where or ())


def words_of_labels(every: Collection[Mapping[str, str]], terms: str) -> str:
    """Return in words the values that workers have of the labels which a place asks for: "arch=x86_64 or none"."""
    texts = []
    for condition in place_of(terms).where or ():
        values = sorted({labels[condition.key] for labels in every if condition.key in labels})
        shown = ", ".join(values[:5]) + (f" and {len(values) - 5} more" if len(values) > 5 else "")
        texts.append(f"{condition.key}={shown}" if values else f"no {condition.key}")
    return "; ".join(texts)
