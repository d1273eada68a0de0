"""Errors: what a command prints with `--json` instead of its answer, and what the API answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field

from celery_capacity.platform.documents.parts import Closed, absent
from celery_capacity.routing.errors import PlatformError

#: Folders of this package whose errors people may meet. Programs on top of it may have errors of their own.
_OURS: Final = __name__.partition(".")[0]


def references() -> list[str]:
    """Return the stable names of all kinds of errors that are loaded, sorted."""

    def kinds(kind: type[PlatformError]) -> Iterator[type[PlatformError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from kinds(child)

    return sorted({kind.reference for kind in kinds(PlatformError) if kind.__module__.partition(".")[0] == _OURS})


def _with_references(schema: dict[str, Any]) -> None:
    schema["enum"] = references()


class PrintedError(Closed):
    """An error, as RFC 9457 has it."""

    type: Annotated[str, Field(pattern="^urn:celery-capacity:error:[a-z-]+$")] = Field(
        description="urn:celery-capacity:error: and the reference"
    )
    title: str = Field(description="the kind of error, in words")
    status: Annotated[int, Field(ge=400, le=599)] = Field(description="the HTTP status of this kind")
    detail: str = Field(description="what is wrong, and what to do")
    reference: str = Field(
        description="the kind of error: stable, for programs to compare", json_schema_extra=_with_references
    )
    value: str = absent("what was wrong, as text; passwords are masked")
    advice: str = absent("what to do")
    problems: Annotated[list[str], Field(min_length=1)] = absent("of wrong-settings: a sentence for each")
    job_id: str = absent("of outcome-unknown: the job")
    accepted: int = absent("of partly-accepted: how many of the jobs were stored")
    unknown: list[str] = absent("of partly-accepted: the jobs after those of which it is not known")


class Problem(BaseModel):
    """An error (RFC 9457), with what to do."""

    type: str = Field(description="a stable URN of the kind of error, or about:blank")
    title: str = Field(description="the kind of error in one phrase")
    status: int = Field(description="the status of the answer")
    detail: str | None = Field(None, description="what was wrong, and what to do")
    reference: str | None = Field(None, description="the stable name of the kind of error")
    value: str | None = Field(None, description="the wrong value")
    advice: str | None = Field(None, description="what to do")
