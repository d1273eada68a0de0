"""The workers of the page of the cluster: which of them a visitor asks for, and their groups."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final
from urllib.parse import urlencode

from celery_capacity.platform.web.api.filters import MAX_TEXT, text_of
from celery_capacity.platform.web.http.problems import wrong_parameter
from celery_capacity.platform.web.pages import bars
from celery_capacity.platform.web.pages.bars import Bar
from celery_capacity.routing.model import amounts
from celery_capacity.routing.model.amounts import format_memory

#: Seconds without a heartbeat after which a worker is shown as late.
LATE: Final = 40.0
#: States of a worker, in the order in which they are shown.
STATUSES: Final = ("ready", "cordoned", "draining", "late")
#: Ways to group, beside `label:KEY`.
BY_STATUS: Final = "status"
BY_SIZE: Final = "size"
BY_LABEL: Final = "label:"
#: Groups that are drawn, the largest ones, and labels that the form offers.
MAX_GROUPS: Final = 50
MAX_LABELS: Final = 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """A visitor's choice of workers, as the query of the page has it; "" is no choice.

    `name`: a part of the name. `label`: KEY=VALUE, or KEY= for workers without this label. `after`: the last name of
    the page before.
    """

    name: str = ""
    status: str = ""
    size: str = ""
    label: str = ""
    group: str = ""
    after: str = ""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Wanted:
        """Return the choice in a query. Raises `InvalidRequest`."""
        texts = {part.name: query.get(part.name, "") for part in fields(cls)}
        for name, value in texts.items():
            if len(value) > MAX_TEXT:
                raise wrong_parameter(name, value[:MAX_TEXT], f"Write at most {MAX_TEXT} characters.")
            text_of(name, value)
        wanted = cls(**texts)
        if wanted.status and wanted.status not in STATUSES:
            raise wrong_parameter("status", wanted.status, f"Write one of {', '.join(STATUSES)}.")
        if wanted.group not in ("", BY_STATUS, BY_SIZE) and not wanted.group.startswith(BY_LABEL):
            raise wrong_parameter("group", wanted.group, f"Write {BY_STATUS}, {BY_SIZE} or {BY_LABEL}KEY.")
        if wanted.label and "=" not in wanted.label:
            raise wrong_parameter("label", wanted.label, "Write KEY=VALUE.")
        return wanted

    @property
    def filters(self) -> bool:
        return bool(self.name or self.status or self.size or self.label)

    @property
    def query(self) -> str:
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return urlencode({name: value for name, value in values.items() if value})

    def takes(self, worker: Mapping[str, Any]) -> bool:
        key, _, value = self.label.partition("=")
        return (
            self.name in worker["name"]
            and self.status in ("", status_of(worker))
            and self.size in ("", size_of(worker))
            and (not key or worker["labels"].get(key, "") == value)
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Workers alike in what they are grouped by. `query`: leads to them. `statuses`: how many are in which state."""

    name: str
    workers: int
    bars: Sequence[Bar]
    statuses: Sequence[tuple[str, int]]
    query: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The workers to show: those on the page, or the groups of all that are wanted. `more`: query of the next page."""

    wanted: Wanted
    workers: Sequence[Mapping[str, Any]]
    groups: Sequence[Group]
    more_groups: int
    more: str
    number: int
    statuses: Sequence[tuple[str, int, str]]
    labels: Sequence[str]


def select(workers: Sequence[Mapping[str, Any]], wanted: Wanted, most: int) -> Selection:
    """Return what a visitor asked for. `workers`: by name, as in `cluster --json`; `most`: on a page."""
    chosen = [worker for worker in workers if wanted.takes(worker)]
    groups = _groups(chosen, wanted) if wanted.group else []
    behind = [] if groups else [worker for worker in chosen if worker["name"] > wanted.after]
    page = behind[:most]
    more = replace(wanted, after=page[-1]["name"]).query if len(page) < len(behind) else ""
    counts = Counter(map(status_of, workers))
    statuses = [(name, counts[name], Wanted(status=name).query) for name in STATUSES if counts[name]]
    labels = sorted({key for worker in workers for key in worker["labels"]})[:MAX_LABELS]
    left_out = max(0, len(groups) - MAX_GROUPS)
    return Selection(wanted, page, groups[:MAX_GROUPS], left_out, more, len(chosen), statuses, labels)


def status_of(worker: Mapping[str, Any]) -> str:
    """Return the state of a worker as the page shows it."""
    return "late" if (worker["heartbeat_age_seconds"] or 0) > LATE else str(worker["status"])


def size_of(worker: Mapping[str, Any]) -> str:
    """Return the capacity of a worker in words: "64 CPUs, 256 GiB, 4 gpus"."""
    named = [f"{part['total']} {name}" for name, part in sorted(worker["named"].items()) if part["total"]]
    return ", ".join([f"{worker['cpus']} CPUs", format_memory(worker["memory"]), *named])


def _groups(workers: Sequence[Mapping[str, Any]], wanted: Wanted) -> list[Group]:
    """Return the groups of these workers, the largest first."""
    by_name: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    key = wanted.group.removeprefix(BY_LABEL)
    for worker in workers:
        value = {BY_STATUS: status_of, BY_SIZE: size_of}.get(wanted.group, lambda w: w["labels"].get(key, ""))(worker)
        by_name[value].append(worker)
    return [
        _group(name, members, wanted)
        for name, members in sorted(by_name.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    ]


def _group(name: str, workers: Sequence[Mapping[str, Any]], wanted: Wanted) -> Group:
    key = wanted.group.removeprefix(BY_LABEL)
    is_label = wanted.group.startswith(BY_LABEL)
    chosen = (
        replace(wanted, group="", label=f"{key}={name}")
        if is_label
        else replace(wanted, **{"group": "", wanted.group: name})
    )
    counts = Counter(map(status_of, workers))
    return Group(
        f"{key}={name or '–'}" if is_label else name,
        len(workers),
        bars.of_many(_sums(workers)),
        [(status, counts[status]) for status in STATUSES if counts[status]],
        chosen.query,
    )


def _sums(workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sums of the amounts of workers, as an object of a worker has them."""
    sums = {name: sum(worker[name] for worker in workers) for name in bars.AMOUNTS}
    totals = amounts.add_up({name: part["total"] for name, part in worker["named"].items()} for worker in workers)
    used = amounts.add_up({name: part["allocated"] for name, part in worker["named"].items()} for worker in workers)
    named = {name: {"total": total, "allocated": used.get(name, 0)} for name, total in totals.items()}
    return {**sums, "named": named}
