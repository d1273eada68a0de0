"""The settings: one frozen dataclass, read from the environment by `Settings.from_environ`.

Reading is pure: a mapping in, a value or one error out. It collects all mistakes into one `SettingsError`. It notices
unknown names that begin with PLATFORM_. An empty variable counts as not set.

Each field's metadata holds its variable, its unit and its meaning; docs/reference/settings.md has the same as a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from celery_capacity.routing.config import contradictions, redis_urls, secret_files, setting_values
from celery_capacity.routing.config.dashboard_settings import DashboardSettings
from celery_capacity.routing.config.embedded import default_home
from celery_capacity.routing.config.meaning import Meaning
from celery_capacity.routing.config.meaning import duration as _duration
from celery_capacity.routing.config.meaning import setting as _setting
from celery_capacity.routing.errors import InvalidRequest, SettingsError, mask_url
from celery_capacity.routing.model import amounts, identifiers

#: Fields that no text shows.
SECRET: Final = frozenset({"token", "viewer_token"})


@dataclass(frozen=True, repr=False)
class Settings(DashboardSettings):
    """All settings, in millicores, bytes and seconds. Raises `SettingsError` for values that contradict each other."""

    redis_url: str | None = _setting(
        "REDIS_URL",
        "The ledger's Redis. Without it and DATABASE_URL, embedded servers serve.",
        redis_urls.check,
        unit="URL",
    )
    database_url: str | None = _setting(
        "DATABASE_URL", "Postgres, the durable truth.", setting_values.database_url, unit="URL"
    )
    direct_database_url: str | None = _setting(
        "PLATFORM_DIRECT_DATABASE_URL",
        "The same Postgres without the pooler in between: one connection of the worker that runs the duties; one of"
        " each worker, if there are enough, while Redis is gone.",
        setting_values.database_url,
        unit="URL",
        shown="DATABASE_URL",
    )
    broker_url: str | None = _setting(
        "CELERY_BROKER_URL", "Where Celery's own messages go.", redis_urls.elsewhere, unit="URL", shown="REDIS_URL"
    )
    result_backend: str | None = _setting(
        "CELERY_RESULT_BACKEND", "Where Celery keeps results.", redis_urls.elsewhere, unit="URL", shown="REDIS_URL"
    )
    node_name: str | None = _setting(
        "NODE_NAME",
        "The worker's name; else that of -n, else the host's.",
        identifiers.check_worker_name,
        unit="name",
    )
    tenant: str = _setting(
        "PLATFORM_TENANT", "Tenant of the jobs that name none.", identifiers.check_tenant, "default", unit="name"
    )
    cpus: int | None = _setting(
        "PLATFORM_CPUS", "CPUs that this worker publishes.", setting_values.positive_cpus, unit="CPUs", shown="detected"
    )
    memory: int | None = _setting(
        "PLATFORM_MEMORY",
        "Memory that this worker publishes.",
        setting_values.memory,
        unit="bytes, or text like 16GiB",
        shown="detected",
    )
    reserved_memory: int | None = _setting(
        "PLATFORM_RESERVED_MEMORY",
        "Memory that is left to the worker itself: the detected memory less this is published, unless PLATFORM_MEMORY"
        " says it. Detected: of a cgroup's limit 128 MiB and 32 MiB for each process, of a machine nothing.",
        setting_values.memory,
        unit="bytes, or text like 512MiB",
        shown="detected",
    )
    gpus: int = _setting(
        "PLATFORM_GPUS", "GPUs that this worker publishes.", amounts.parse_count_text, default=0, unit="count"
    )
    resources: Mapping[str, int] = _setting(
        "PLATFORM_RESOURCES",
        "Named resources that this worker publishes.",
        setting_values.resources,
        default={},
        unit="counts, like licence=3,scratch=200",
        shown="none",
    )
    labels: Mapping[str, str] = _setting(
        "PLATFORM_LABELS", "Labels of this worker.", setting_values.labels, default={}, unit="a=1,b=2", shown="none"
    )
    placement: str = _setting(
        "PLATFORM_PLACEMENT", "Placement of jobs.", setting_values.placement, default="pack", unit="pack or spread"
    )
    default_cpus: int = _setting(
        "PLATFORM_DEFAULT_CPUS",
        "CPUs of a job that does not say.",
        amounts.parse_cpus_text,
        default=amounts.MILLICORES,
        unit="CPUs",
        shown="1",
    )
    max_message: int = _setting(
        "PLATFORM_MAX_MESSAGE",
        "The largest task message that is accepted.",
        setting_values.memory,
        default=1024**2,
        unit="bytes",
    )
    max_backlog: int = _setting(
        "PLATFORM_MAX_BACKLOG",
        "Waiting jobs above which submissions are refused; 0: no limit.",
        amounts.parse_count_text,
        default=0,
        unit="jobs",
    )
    max_ledger_backlog: int = _setting(
        "PLATFORM_MAX_LEDGER_BACKLOG",
        "Waiting jobs that Redis holds, about; the others wait in Postgres, and are fetched in order. 0: no limit.",
        amounts.parse_count_text,
        default=10_000,
        unit="jobs",
    )
    backfill_depth: int = _setting(
        "PLATFORM_BACKFILL_DEPTH",
        "Blocked requests that get a worker reserved, so that wide jobs get their turn. 1 is EASY backfill; 0: none.",
        amounts.parse_count_text,
        default=1,
        unit="requests",
    )
    most_losses: int = _setting(
        "PLATFORM_MOST_LOSSES",
        "Attempts that a job may lose with their worker or process before it ends as lost.",
        amounts.parse_count_text,
        default=3,
        unit="attempts",
    )
    lifetime: float | datetime | None = _setting(  # noqa: RUF009 - it does not change
        "PLATFORM_LIFETIME",
        "How long this worker lives from its start, or until when. It takes no job that would not end before, and"
        " drains then.",
        setting_values.lifetime,
        unit="seconds, text like 2h, or a time in ISO 8601",
        shown="for ever",
    )
    learn_run_times: bool = _setting(
        "PLATFORM_LEARN_RUN_TIMES",
        "Whether jobs without an expected run time get the usual one of their task and request. Lifetimes and"
        " reservations go by it.",
        setting_values.switch,
        default=False,
        unit="on or off",
        shown="off",
    )
    requests: Path | None = _setting(  # noqa: RUF009 - it does not change
        "PLATFORM_REQUESTS",
        "A TOML file with requests by names of tasks.",
        setting_values.folder,
        unit="absolute path",
        shown="none",
    )
    imports: tuple[str, ...] = _setting(
        "PLATFORM_IMPORTS",
        "Modules with tasks.",
        setting_values.modules,
        default=(),
        unit="names, separated by commas",
        shown="none",
    )
    home: Path = field(
        default_factory=lambda: default_home({}),
        metadata={
            "setting": Meaning(
                "PLATFORM_HOME",
                "the user's state folder/celery-capacity",
                "absolute path",
                "Folder of the embedded servers.",
                setting_values.folder,
            )
        },
    )
    heartbeat_interval: float = _duration(
        "PLATFORM_HEARTBEAT_INTERVAL", 30.0, "Between two heartbeats that beat sends."
    )
    renew_interval: float = _duration(
        "PLATFORM_RENEW_INTERVAL",
        10.0,
        "Between two renewals by the worker's own timer. Below PLATFORM_WORKER_TTL.",
    )
    worker_ttl: float = _duration(
        "PLATFORM_WORKER_TTL", 60.0, "After this time without a heartbeat, a worker gets no more jobs."
    )
    lost_after: float = _duration(
        "PLATFORM_LOST_AFTER",
        75.0,
        "After this time without a heartbeat, a worker's jobs are taken back as new attempts. Not below"
        " PLATFORM_WORKER_TTL.",
    )
    start_timeout: float = _duration(
        "PLATFORM_START_TIMEOUT",
        15.0,
        "If a worker does not claim an admitted job within this time, the same attempt is delivered again.",
    )
    due_interval: float = _duration(
        "PLATFORM_DUE_INTERVAL", 1.0, "Between two looks for jobs that are due or expired, and for lost workers."
    )
    share_halves_in: float = _duration(
        "PLATFORM_SHARE_HALF_LIFE", 600.0, "In which the past use of a tenant counts half. 0: past use does not count."
    )
    reserve_after: float = _duration(
        "PLATFORM_RESERVE_AFTER",
        60.0,
        "With a PLATFORM_BACKFILL_DEPTH, a worker is kept for a blocked job that is so late.",
    )
    sweep_interval: float = _duration(
        "PLATFORM_SWEEP_INTERVAL",
        10.0,
        "Between two looks for accepted jobs that the ledger does not know, unclaimed messages, and free room.",
    )
    reconcile_interval: float = _duration(
        "PLATFORM_RECONCILE_INTERVAL", 300.0, "Between two comparisons of both stores."
    )
    runner_term: float = _duration(
        "PLATFORM_RUNNER_TERM", 5.0, "The lease of the worker that runs the duties; another takes over within twice it."
    )
    confirm_interval: float = _duration(
        "PLATFORM_CONFIRM_INTERVAL",
        5.0,
        "Between two questions which store admits. An answer is valid for twice as long.",
    )
    store_timeout: float = _duration(
        "PLATFORM_STORE_TIMEOUT",
        10.0,
        "Within this time a call to Postgres is answered, or given up with an error; duties have six times as long."
        " Redis has half of it for an answer, and so has each step of a worker's departure.",
    )
    tombstone: float = _duration(
        "PLATFORM_TOMBSTONE",
        60.0,
        "How long the ledger remembers an ended job, once Postgres has its end. Submits older than half of it are"
        " refused.",
    )
    write_within: float = _duration(
        "PLATFORM_WRITE_WITHIN",
        20.0,
        "If Postgres takes no outcome of a worker for this time, that worker claims and admits nothing more.",
    )
    keep_finished: float = _duration(
        "PLATFORM_KEEP_FINISHED", 2_592_000.0, "How long after its end a job moves into the archive; 0: never."
    )
    keep_archived: float = _duration(
        "PLATFORM_KEEP_ARCHIVED",
        0.0,
        "How long a job stays in the archive at least; then its month is dropped as a whole; 0: for ever.",
    )
    fail_infeasible_after: float = _duration(
        "PLATFORM_FAIL_INFEASIBLE_AFTER", 0.0, "A job that no registered worker could hold fails after it; 0: never."
    )
    ageing: float = _duration(
        "PLATFORM_AGEING", 0.0, "A waiting job gains a step of priority in each such time; 0: none."
    )
    shutdown_grace: float = _duration(
        "PLATFORM_SHUTDOWN_GRACE",
        0.0,
        "After a TERM running jobs have so long to end; then they are handed back. 0: no limit. Some 10 s less than the"
        " time after which the service manager kills.",
    )
    health_dir: Path | None = _setting(  # noqa: RUF009 - it does not change
        "PLATFORM_HEALTH_DIR",
        "Folder of the files `live` and `ready`, which each heartbeat touches.",
        setting_values.folder,
        unit="absolute path",
        shown="none",
    )
    lock_dir: Path | None = _setting(  # noqa: RUF009 - it does not change
        "PLATFORM_LOCK_DIR",
        "Folder on a local disk that outlives a restart of the container: by a lock there, a worker that is started"
        " again knows that its predecessor is dead.",
        setting_values.folder,
        unit="absolute path",
        shown="none",
    )
    #: harmless oddities of the environment, a sentence each
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        # The broker and the results follow the ledger's Redis unless they have URLs of their own.
        for name in ("broker_url", "result_backend"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.redis_url)
        wrong = _contradictions({f.name: getattr(self, f.name) for f in fields(self)})
        if wrong:
            raise SettingsError(wrong)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings. Raises one `SettingsError` that names all that is wrong.

        Reads nothing but `environ` and the files that it names for URLs (`secret_files`). Asks the system for the
        user's home folder where HOME is not in `environ`.
        """
        values: dict[str, Any] = {"home": default_home(environ)}
        wrong: list[str] = []
        failed: set[str] = set()
        for setting in _described():
            meaning: Meaning = setting.metadata["setting"]
            try:
                value = secret_files.parsed(environ, meaning.env, meaning.parse)
            except InvalidRequest as error:
                wrong.append(str(error))
                failed.add(setting.name)
                continue
            if value is not None:
                values[setting.name] = value
        effective = {f.name: f.default for f in _described()} | values
        wrong += _contradictions({name: value for name, value in effective.items() if name not in failed})
        if wrong:
            raise SettingsError(wrong)
        return cls(**values, warnings=unknown_names(environ))

    def with_urls(self, redis_url: str, database_url: str) -> Settings:
        """Return these settings on other servers; broker and results follow unless they have their own place."""
        return replace(
            self,
            redis_url=redis_urls.check(redis_url, "REDIS_URL"),
            database_url=setting_values.database_url(database_url, "DATABASE_URL"),
            broker_url=None if self.broker_url == self.redis_url else self.broker_url,
            result_backend=None if self.result_backend == self.redis_url else self.result_backend,
        )

    def __repr__(self) -> str:
        shown = (f"{f.name}={mask_url(repr(getattr(self, f.name)))}" for f in fields(self) if f.name not in SECRET)
        return f"{type(self).__name__}({', '.join(shown)})"


def _described() -> list[Field[Any]]:
    """Return the fields that have a variable. Those of the dashboard come last."""
    inherited = {f.name for f in fields(DashboardSettings)}
    described = [f for f in fields(Settings) if "setting" in f.metadata]
    return sorted(described, key=lambda f: f.name in inherited)


def described() -> list[tuple[str, Meaning]]:
    """Return (field, its meaning) for every setting, in the order of the docs."""
    return [(f.name, f.metadata["setting"]) for f in _described()]


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    return contradictions.contradictions(values, described())


def unknown_names(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return a warning for each PLATFORM_ name that is no setting, with the nearest setting."""
    return contradictions.warnings_of(environ, [meaning.env for _, meaning in described()])
