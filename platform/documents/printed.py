"""The document that each command prints with `--json`, and its JSON Schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from celery_capacity.platform.documents import actions, checks, cluster, errors, job, orders, planning, servers

#: Names of the schemas before that of the document.
SCHEMA_ID: Final = "urn:celery-capacity:schema:"


@dataclass(frozen=True, slots=True)
class Printed:
    """A document. `call`: the command with its arguments, without `--json`. `path`: of the API, with this answer."""

    model: type[BaseModel]
    call: str
    path: str | None = None

    @property
    def title(self) -> str:
        """Return the title of the schema: what prints the document."""
        also = "" if self.path is None else f", and GET {self.path}"
        return f"celery -A platform {self.call} --json{also}"


#: Documents by the name of their command, its words joined by "-".
PRINTED: Final[Mapping[str, Printed]] = {
    "backlog": Printed(cluster.Backlog, "backlog", "/api/v1/backlog"),
    "cancel": Printed(actions.PrintedCancels, "cancel ID..."),
    "cluster": Printed(cluster.Dashboard, "cluster", "/api/v1/dashboard"),
    "cordon": Printed(orders.PrintedCordons, "cordon NAME..."),
    "db-current": Printed(servers.Revision, "db current"),
    "db-downgrade": Printed(servers.Migration, "db downgrade"),
    "db-upgrade": Printed(servers.Migration, "db upgrade"),
    "demo": Printed(planning.Replay, "demo"),
    "down": Printed(servers.EndedServers, "down"),
    "drain": Printed(orders.PrintedDrains, "drain NAME..."),
    "job": Printed(job.JobDetail, "job ID", "/api/v1/jobs/ID"),
    "jobs": Printed(job.PrintedJobs, "jobs"),
    "logs": Printed(job.LogLine, "logs ID"),
    "pause": Printed(orders.PausedPart, "pause"),
    "priority": Printed(actions.PrintedPriorities, "priority ID... N"),
    "reconcile": Printed(checks.PrintedReconcile, "reconcile"),
    "resume": Printed(orders.PausedPart, "resume"),
    "retry": Printed(actions.PrintedRetries, "retry ID..."),
    "servers-start": Printed(servers.Servers, "servers start"),
    "settings": Printed(servers.PrintedSettings, "settings"),
    "simulate": Printed(planning.Simulation, "simulate"),
    "stats": Printed(job.Tasks, "stats", "/api/v1/tasks"),
    "submit": Printed(actions.SubmittedJob, "submit TASK"),
    "tail": Printed(job.Change, "tail ID..."),
    "tenant-list": Printed(orders.Tenants, "tenant list"),
    "tenant-remove": Printed(orders.RuledTenant, "tenant remove"),
    "tenant-set": Printed(orders.RuledTenant, "tenant set"),
    "top": Printed(cluster.Top, "top"),
    "uncordon": Printed(orders.PrintedUncordons, "uncordon NAME..."),
    "up": Printed(servers.Started, "up"),
    "verify": Printed(checks.Verification, "verify"),
    "wait": Printed(actions.PrintedEnds, "wait ID..."),
    "whatif": Printed(planning.Whatif, "whatif"),
    "workers": Printed(cluster.ChosenWorkers, "workers"),
}
ERROR_TITLE: Final = (
    "what any command prints with --json instead of its answer, and the dashboard as application/problem+json"
)


class _Untitled(GenerateJsonSchema):
    """JSON Schema of a model, without the titles that repeat the names of members and classes."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> dict[str, Any]:
        return self._without_title(super().model_schema(schema))

    def enum_schema(self, schema: core_schema.EnumSchema) -> dict[str, Any]:
        return self._without_title(super().enum_schema(schema))

    @staticmethod
    def _without_title(schema: dict[str, Any]) -> dict[str, Any]:
        return {word: value for word, value in schema.items() if word != "title"}


def schema_of(name: str) -> dict[str, Any]:
    """Return the JSON Schema of a command's document, or of an error ("error")."""
    model, title = (errors.PrintedError, ERROR_TITLE) if name == "error" else (PRINTED[name].model, PRINTED[name].title)
    schema = model.model_json_schema(mode="serialization", schema_generator=_Untitled)
    definitions = schema.pop("$defs", {})
    head = {"$schema": GenerateJsonSchema.schema_dialect, "$id": f"{SCHEMA_ID}{name}", "title": title}
    return {**head, **schema, **({"$defs": definitions} if definitions else {})}
