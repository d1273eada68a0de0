"""The workflow of a job: its parents and children, and the steps of its canvas, as far as the rows tell.

Jobs that others published are found by their root, and parents by their ids, in the archive too. A message names the
later steps of a chain, and the body of a chord: Celery chooses their ids before they are submitted. The archive keeps
no messages, so an archived job names no steps and no group. No index has the groups: a part of a group that nothing
precedes is its own root. Such parts are searched among the jobs whose numbers of submission are near.
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

#: Numbers on both sides of a job among which its group is searched. The jobs of a group are submitted together.
GROUP_NEAR: Final = 1000
#: Jobs of a workflow that are read of each table, and bytes of a message that is read for its steps.
MAX_JOBS: Final = 500
MAX_MESSAGE: Final = 65_536
#: Parents of parents, and further looks for steps that messages name.
MAX_ANCESTORS: Final = 50
MAX_LOOKS: Final = 5
#: Retries before and after a job.
MAX_RETRIES: Final = 50

_COLUMNS: Final = "id, seq, name, state, parent_id, replaces"
_ARCHIVED: Final = "id, seq, name, state, parent_id, NULL AS replaces, NULL AS message"
_MESSAGE: Final = f"CASE WHEN octet_length(message) <= {MAX_MESSAGE} THEN message END AS message"

# Of an id that came again after its first job had moved to the archive, the later job counts.
_ANCESTORS: Final = text("""
WITH RECURSIVE up AS (
  SELECT CAST(NULL AS text) AS id, CAST(NULL AS bigint) AS seq, CAST(NULL AS text) AS root_id,
    CAST(:id AS text) AS parent_id, -1 AS depth
  UNION ALL
  SELECT next.id, next.seq, next.root_id, next.parent_id, depth + 1 FROM up CROSS JOIN LATERAL (
    SELECT id, seq, root_id, parent_id FROM jobs WHERE jobs.id = up.parent_id
    UNION ALL SELECT id, seq, root_id, parent_id FROM jobs_archive AS a WHERE a.id = up.parent_id
    ORDER BY seq DESC LIMIT 1
  ) AS next WHERE depth < :most
) SELECT * FROM up WHERE depth >= 0 ORDER BY depth
""")
# The second condition is that of the index `jobs_root`, which leaves out jobs that are their own root.
_OF_ROOT: Final = """
SELECT {columns} FROM {table} WHERE root_id = :root AND root_id <> id ORDER BY seq LIMIT :most
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
_ARCHIVED_BY_ID: Final = f"SELECT {_ARCHIVED} FROM jobs_archive WHERE id = ANY(CAST(:ids AS text[])) ORDER BY seq DESC"
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

    `whole`: False where the workflow has more jobs than were read. `retries`: the job that was repeated first and its
    retries, each with its state; none where nothing was repeated.
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
    """Return the workflow of a job; one without members for an unknown job.

    Only messages name the steps ahead and the groups. A role that may not read them learns of the submitted jobs alone.
    """
    ancestors = connection.execute(_ANCESTORS, {"id": job, "most": MAX_ANCESTORS}).all()
    if not ancestors:
        return Workflow(job)
    its_row, root = ancestors[0], ancestors[0].root_id or job
    readable = connection.execute(select(func.has_column_privilege("jobs", "message", "SELECT"))).scalar_one()
    columns = f"{_COLUMNS}, {_MESSAGE if readable else 'NULL AS message'}"
    family, whole = _Family(), True
    for table, selected in (("jobs", columns), ("jobs_archive", _ARCHIVED)):
        statement = text(_OF_ROOT.format(columns=selected, table=table))
        rows = connection.execute(statement, {"root": root, "most": MAX_JOBS}).all()
        whole &= len(rows) < MAX_JOBS
        family.add(rows)
    asked: set[str] = set()
    ids = {root, *(row.id for row in ancestors)}
    for _ in range(MAX_LOOKS):
        family.add(connection.execute(text(_BY_ID.format(columns=columns)), {"ids": sorted(ids)}))
        family.add(connection.execute(text(_ARCHIVED_BY_ID), {"ids": sorted(ids)}))
        if not asked and (group := family.group_of(job)):
            family.add(connection.execute(text(_GROUP.format(columns=columns)), _around(its_row.seq, group)))
        asked |= ids
        if not (ids := family.steps_ahead - asked) or len(asked) > MAX_JOBS:
            break
    repeated = connection.execute(_RETRIES, {"seq": its_row.seq, "id": job, "most": MAX_RETRIES}).all()
    retries = tuple((row.id, row.state) for row in repeated) if len(repeated) > 1 else ()
    return Workflow(root, family.members(), frozenset(family.links), whole, retries)


def _around(seq: int, group: str) -> dict[str, Any]:
    """Return the values of the search for the parts of a group around a number of submission."""
    bounds = {"low": seq - GROUP_NEAR, "high": seq + GROUP_NEAR, "most": MAX_JOBS}
    return {"states": [state.value for state in State], "header": group_header(group), **bounds}


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
