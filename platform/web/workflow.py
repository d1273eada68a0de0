"""The workflow of a job: its parents and children, and the steps of its canvas, as far as the rows tell.

No index of jobs has their workflows. So the jobs whose numbers of submission are near are looked through, a bounded
number of them. Parents are read by their ids. So are the steps that a message names: Celery chooses the ids of the
later steps of a chain, and of the body of a chord, before they are submitted.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Connection, func, select, text

from celery_capacity.routing.database.job_conditions import group_header
from celery_capacity.routing.model.states import State

#: Numbers of submission that are looked through. Postgres reads so many rows in some 20 ms.
NEAR: Final = 10_000
#: Numbers on both sides of a job among which its group is searched. The jobs of a group are submitted together.
GROUP_NEAR: Final = 1000
#: Jobs of a workflow that are read, and bytes of a message that is read for its steps.
MAX_JOBS: Final = 500
MAX_MESSAGE: Final = 65_536
#: Parents of parents, and further looks for steps that messages name.
MAX_ANCESTORS: Final = 50
MAX_LOOKS: Final = 5
#: Retries before and after a job.
MAX_RETRIES: Final = 50

_COLUMNS: Final = "id, seq, name, state, parent_id, replaces"
_MESSAGE: Final = f"CASE WHEN octet_length(message) <= {MAX_MESSAGE} THEN message END AS message"

_ANCESTORS: Final = text("""
WITH RECURSIVE up AS (
  SELECT id, seq, root_id, parent_id, attempt > 1 OR retries > 0 AS moved, 0 AS depth FROM jobs WHERE id = :id
  UNION ALL
  SELECT j.id, j.seq, j.root_id, j.parent_id, j.attempt > 1 OR j.retries > 0, depth + 1
  FROM jobs AS j JOIN up ON j.id = up.parent_id WHERE depth < :most
) SELECT * FROM up ORDER BY depth
""")
_NEAR: Final = """
SELECT near.* FROM unnest(CAST(:states AS text[])) AS s (state) CROSS JOIN LATERAL (
  SELECT {columns} FROM jobs
  WHERE jobs.state = s.state AND seq BETWEEN :low AND :high AND root_id = :root ORDER BY seq LIMIT :most
) AS near
"""
# Each task of a group that nothing precedes is its own root. Messages alone name their group.
_GROUP: Final = f"""
SELECT near.* FROM unnest(CAST(:states AS text[])) AS s (state) CROSS JOIN LATERAL (
  SELECT {{columns}} FROM jobs
  WHERE jobs.state = s.state AND seq BETWEEN :low AND :high AND octet_length(message) <= {MAX_MESSAGE}
    AND position(CAST(:header AS bytea) IN message) > 0 ORDER BY seq LIMIT :most
) AS near
"""
_BY_ID: Final = (
    "SELECT {columns} FROM jobs WHERE id = ANY(CAST(:ids AS text[])) OR replaces = ANY(CAST(:ids AS text[]))"
)
_NEWEST: Final = text("""
SELECT max(newest.seq) FROM unnest(CAST(:states AS text[])) AS s (state) CROSS JOIN LATERAL (
  SELECT seq FROM jobs WHERE jobs.state = s.state ORDER BY seq DESC LIMIT 1
) AS newest
""")
# The job that was repeated first, then its retries, each with its state. A job in the archive has none.
_RETRIES: Final = text("""
WITH RECURSIVE before AS (
  SELECT of_seq AS seq, of_job AS id, 1 AS depth FROM retries WHERE seq = :seq
  UNION ALL SELECT r.of_seq, r.of_job, depth + 1 FROM retries AS r JOIN before ON r.seq = before.seq WHERE depth < :most
), first AS (
  SELECT seq, id FROM (SELECT seq, id, depth FROM before UNION ALL SELECT CAST(:seq AS bigint), :id, 0) AS known
  ORDER BY depth DESC LIMIT 1
), story AS (
  SELECT seq, id, 0 AS depth, CAST(NULL AS timestamptz) AS made_at FROM first
  UNION ALL SELECT r.seq, r.job, depth + 1, r.made_at FROM retries AS r JOIN story ON r.of_seq = story.seq
  WHERE depth < :most
)
SELECT story.id, jobs.state, story.made_at FROM story LEFT JOIN jobs ON jobs.seq = story.seq AND jobs.id = story.id
ORDER BY story.made_at NULLS FIRST, story.seq LIMIT :most
""")


class Link(StrEnum):
    """Kind of a link from a job to the next one."""

    #: the first published the second, as the next step of a chain or from its body
    CHILD = "child"
    #: the second is the body of the chord that the first is a part of
    CHORD = "chord"
    #: the second replaces the first
    REPLACES = "replaces"


@dataclass(frozen=True, slots=True)
class Member:
    """A job of a workflow. `state`: None for a step that is not submitted yet. `group`: Celery's id of its group."""

    id: str
    name: str
    state: str | None
    group: str | None = None
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Workflow:
    """Jobs by their ids, in the order of submission, and their links.

    `whole`: False where later jobs were submitted than were looked through. `retries`: the job that was repeated first
    and its retries, each with its state; none where nothing was repeated.
    """

    root: str
    members: Mapping[str, Member] = field(default_factory=dict)
    links: frozenset[tuple[str, str, Link]] = frozenset()
    whole: bool = True
    retries: tuple[tuple[str, str | None], ...] = ()

    def to_json(self) -> dict[str, Any]:
        jobs = [{"id": m.id, "name": m.name, "state": m.state, "group": m.group} for m in self.members.values()]
        links = [{"from": first, "to": second, "kind": kind.value} for first, second, kind in sorted(self.links)]
        retries = [{"id": job, "state": state} for job, state in self.retries]
        return {"root": self.root, "jobs": jobs, "links": links, "whole": self.whole, "retries": retries}


def read(connection: Connection, job: str) -> Workflow:
    """Return the workflow of a job; one without members for a job that is in the archive.

    Only messages name the steps ahead and the groups. A role that may not read them learns of the submitted jobs alone.
    """
    ancestors = connection.execute(_ANCESTORS, {"id": job, "most": MAX_ANCESTORS}).all()
    if not ancestors:
        return Workflow(job)
    its_row, root = ancestors[0], ancestors[0].root_id or job
    low = min(row.seq for row in ancestors)
    # A job that puts itself back has a new number, and one in the archive has none: its children may have lower ones.
    if ancestors[-1].id != root or any(row.moved for row in ancestors):
        low -= NEAR // 2
    readable = connection.execute(select(func.has_column_privilege("jobs", "message", "SELECT"))).scalar_one()
    columns = f"{_COLUMNS}, {_MESSAGE if readable else 'NULL AS message'}"
    states = [state.value for state in State]
    values = {"states": states, "low": low, "high": low + NEAR, "root": root, "most": MAX_JOBS}
    family = _Family()
    family.add(connection.execute(text(_NEAR.format(columns=columns)), values))
    if group := family.group_of(job):
        around = {"low": its_row.seq - GROUP_NEAR, "high": its_row.seq + GROUP_NEAR, "header": group_header(group)}
        family.add(connection.execute(text(_GROUP.format(columns=columns)), values | around))
    asked: set[str] = set()
    ids = {row.id for row in ancestors}
    for _ in range(MAX_LOOKS):
        family.add(connection.execute(text(_BY_ID.format(columns=columns)), {"ids": sorted(ids)}))
        asked |= ids
        if not (ids := family.steps_ahead - asked) or len(asked) > MAX_JOBS:
            break
    newest = connection.execute(_NEWEST, {"states": states}).scalar_one()
    repeated = connection.execute(_RETRIES, {"seq": its_row.seq, "id": job, "most": MAX_RETRIES}).all()
    retries = tuple((row.id, row.state) for row in repeated) if len(repeated) > 1 else ()
    return Workflow(root, family.members(), frozenset(family.links), newest <= low + NEAR, retries)


class _Family:
    """Jobs and steps as they are found. A job's row counts more than what a message says about it."""

    def __init__(self) -> None:
        self.links: set[tuple[str, str, Link]] = set()
        self._jobs: dict[str, Member] = {}
        self._steps: dict[str, Member] = {}

    @property
    def steps_ahead(self) -> set[str]:
        """Return the ids that messages name, without those of jobs whose rows were read."""
        return self._steps.keys() - self._jobs.keys()

    def group_of(self, job: str) -> str | None:
        return self._jobs[job].group if job in self._jobs else None

    def members(self) -> dict[str, Member]:
        """Return the members in the order of submission; steps that are not submitted come last."""
        by_id = self._steps | self._jobs
        self.links = {link for link in self.links if link[0] in by_id and link[1] in by_id}
        ordered = sorted(by_id.values(), key=lambda member: (member.state is None, member.seq))
        return {member.id: member for member in ordered}

    def add(self, rows: Any) -> None:
        for row in rows:
            if row.id in self._jobs:
                continue
            headers, embed = _parts(row.message)
            group = headers.get("group")
            self._jobs[row.id] = Member(row.id, row.name, row.state, group if isinstance(group, str) else None, row.seq)
            if row.parent_id:
                self.links.add((row.parent_id, row.id, Link.CHILD))
            if row.replaces:
                self.links.add((row.replaces, row.id, Link.REPLACES))
            self._add_steps(row.id, embed)

    def _add_steps(self, job: str, embed: Mapping[str, Any]) -> None:
        before = [job]
        # The next step of a chain stands last.
        for step in reversed(embed.get("chain") or []):
            before = list(self._step(before, step, Link.CHILD)) or before
        chord = embed.get("chord")
        if isinstance(chord, dict):
            # A chord that ends a chain has the last step as its part.
            list(self._step(before, chord, Link.CHORD))

    def _step(self, before: list[str], step: Any, kind: Link) -> Iterator[str]:
        """Add a step behind others, and yield the ids of the jobs that the next one follows."""
        if not isinstance(step, dict):
            return
        kwargs = step.get("kwargs") or {}
        if "header" in kwargs and "body" in kwargs:
            header = kwargs["header"]
            tasks = header.get("kwargs", {}).get("tasks", []) if isinstance(header, dict) else header
            parts = [part for task in tasks for part in self._step(before, task, kind)]
            yield from self._step(parts or before, kwargs["body"], Link.CHORD)
        elif step.get("task") in ("celery.group", "celery.chain") and isinstance(kwargs.get("tasks"), list):
            if step["task"] == "celery.group":
                yield from (part for task in kwargs["tasks"] for part in self._step(before, task, kind))
                return
            for task in kwargs["tasks"]:
                before = list(self._step(before, task, kind)) or before
            yield from before
        elif isinstance(job := (step.get("options") or {}).get("task_id"), str):
            self._steps.setdefault(job, Member(job, str(step.get("task")), None))
            self.links.update((first, job, kind) for first in before)
            yield job


def _parts(message: bytes | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the headers of a message, and the part of its body that names further steps; {} for a missing one."""
    try:
        content = json.loads(bytes(message or b"{}"))
        headers = content.get("headers") or {}
        body = json.loads(base64.b64decode(content.get("body") or ""))
        embed = body[2] if isinstance(body, list) and len(body) > 2 else {}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}, {}
    return headers if isinstance(headers, dict) else {}, embed if isinstance(embed, dict) else {}
