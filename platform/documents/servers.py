"""Servers, processes, tables and settings, as the commands that start or show them print."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, RootModel

from celery_capacity.platform.documents.parts import Amount, Closed, Natural, Positive


class Servers(Closed):
    """The servers that run now."""

    redis_url: str = Field(description="URL of Redis, without a password")
    database_url: str = Field(description="URL of Postgres, without a password")
    embedded: bool = Field(description="false where REDIS_URL and DATABASE_URL name the servers")


class StartedWorker(Closed):
    """A worker that became ready."""

    name: str = Field(description="its name")
    cpus: Amount = Field(description="CPUs that it publishes")
    memory: Natural = Field(description="bytes that it publishes")
    slots: Natural = Field(description="slots of its pool")
    pid: Positive | None = Field(description="process id")


class StartedBeat(Closed):
    """Beat, which runs the duties."""

    pid: Positive = Field(description="process id")


class StartedDashboard(Closed):
    """The dashboard."""

    url: str = Field(description="where it answers")
    pid: Positive = Field(description="process id")


class Started(Closed):
    """Processes and servers, once all of them are ready."""

    redis_url: str = Field(description="the ledger, without its password")
    database_url: str = Field(description="Postgres, without its password")
    embedded: bool = Field(description="whether the servers are the embedded ones of this user")
    workers: list[StartedWorker] = Field(description="the workers that became ready")
    beat: StartedBeat | None = Field(description="null where it does not run here")
    dashboard: StartedDashboard | None = Field(description="null where it does not run here")


class EndedServers(Closed):
    """The servers that were ended."""

    ended: Annotated[list[str], Field(max_length=2)] = Field(
        description="a phrase for each server that was ended; empty where none ran"
    )
    home: str = Field(description="the folder with their data, which stay")


class Revision(Closed):
    """Revision of the tables."""

    current: str | None = Field(description="the revision; null without tables")
    head: str = Field(description="the revision that this version needs")
    up_to_date: bool = Field(description="whether these are the same")


class Migration(Closed):
    """Revisions of the tables before and after a migration."""

    before: str | None = Field(description="the revision before; null without tables")
    current: str | None = Field(description="the revision now; null without tables")
    head: str = Field(description="the revision that this version needs")


class Setting(Closed):
    """A setting."""

    name: str = Field(description="its variable in the environment")
    value: str | None = Field(
        description="its value as it was written, with passwords in URLs masked; null where it is not set"
    )
    default: str | None = Field(description="its default as text; null for none")
    problem: str | None = Field(description="what is wrong with the value; null where it is right")
    unit: str | None = Field(description="the unit or the form of its value; null for plain text")
    meaning: str = Field(description="what it does")


class PrintedSettings(RootModel[list[Setting]]):
    """The settings, in the order of their page."""
