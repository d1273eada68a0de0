"""Settings: read purely, all wrong ones in one error, slips noticed, and the table in the docs true."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from celery_capacity.routing.config import embedded, process_identity
from celery_capacity.routing.config.settings import Settings, described
from celery_capacity.routing.errors import InvalidRequest, NoServers, SettingsError

ROOT = Path(__file__).parents[4]
URLS = {"REDIS_URL": "redis://:s3cret@host:6379/0", "DATABASE_URL": "postgres://user:s3cret@host/db"}


def problems(environ: dict[str, str]) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ(environ)
    return caught.value.problems


def test_an_empty_environment_gives_the_documented_defaults() -> None:
    settings = Settings.from_environ({"HOME": "/home/ada"})
    assert dataclasses.asdict(settings) == {
        "redis_url": None,
        "database_url": None,
        "direct_database_url": None,
        "broker_url": None,
        "result_backend": None,
        "node_name": None,
        "tenant": "default",
        "cpus": None,
        "memory": None,
        "reserved_memory": None,
        "gpus": 0,
        "resources": {},
        "labels": {},
        "placement": "pack",
        "default_cpus": 1000,
        "max_message": 1048576,
        "max_backlog": 0,
        "max_ledger_backlog": 10_000,
        "backfill_depth": 1,
        "most_losses": 3,
        "lifetime": None,
        "learn_run_times": False,
        "requests": None,
        "imports": (),
        "home": embedded.default_home({"HOME": "/home/ada"}),
        "dashboard": ("127.0.0.1", 8000),
        "token": None,
        "viewer_token": None,
        "proxy_user_header": None,
        "keep_audit": 7_776_000.0,
        "log_format": "text",
        "keep_logs": 0,
        "traces": False,
        "worker_metrics": None,
        "heartbeat_interval": 30.0,
        "renew_interval": 10.0,
        "worker_ttl": 60.0,
        "lost_after": 75.0,
        "start_timeout": 15.0,
        "due_interval": 1.0,
        "share_halves_in": 600.0,
        "reserve_after": 60.0,
        "sweep_interval": 10.0,
        "reconcile_interval": 300.0,
        "runner_term": 5.0,
        "confirm_interval": 5.0,
        "store_timeout": 10.0,
        "tombstone": 60.0,
        "write_within": 20.0,
        "keep_finished": 2_592_000.0,
        "keep_archived": 0.0,
        "fail_infeasible_after": 0.0,
        "ageing": 0.0,
        "shutdown_grace": 0.0,
        "health_dir": None,
        "lock_dir": None,
        "warnings": (),
    }


def test_every_setting_is_read_from_its_variable() -> None:
    environ = {
        **URLS,
        "PLATFORM_DIRECT_DATABASE_URL": "postgres://user:s3cret@server/db",
        "CELERY_BROKER_URL": "amqp://host",
        "CELERY_RESULT_BACKEND": "db+sqlite://",
        "NODE_NAME": "node-1",
        "PLATFORM_TENANT": "physics",
        "PLATFORM_CPUS": "0.5",
        "PLATFORM_MEMORY": "2GiB",
        "PLATFORM_RESERVED_MEMORY": "512MiB",
        "PLATFORM_GPUS": "2",
        "PLATFORM_RESOURCES": "licence=3, scratch = 200,",
        "PLATFORM_DEFAULT_CPUS": "0",
        "PLATFORM_MAX_MESSAGE": "2MiB",
        "PLATFORM_MAX_BACKLOG": "1000",
        "PLATFORM_MAX_LEDGER_BACKLOG": "20000",
        "PLATFORM_BACKFILL_DEPTH": "2",
        "PLATFORM_MOST_LOSSES": "2",
        "PLATFORM_LIFETIME": "8h",
        "PLATFORM_LEARN_RUN_TIMES": "on",
        "PLATFORM_REQUESTS": "/srv/requests.toml",
        "PLATFORM_IMPORTS": "tasks, jobs.nightly",
        "PLATFORM_HOME": "/srv/home",
        "PLATFORM_DASHBOARD": "[::1]:0",
        "PLATFORM_TOKEN": "0123456789abcdef",
        "PLATFORM_VIEWER_TOKEN": "fedcba9876543210",
        "PLATFORM_PROXY_USER_HEADER": "X-Forwarded-User",
        "PLATFORM_KEEP_AUDIT": "86400",
        "PLATFORM_LOG_FORMAT": "JSON",
        "PLATFORM_KEEP_LOGS": "500",
        "PLATFORM_TRACES": "on",
        "PLATFORM_WORKER_METRICS": "127.0.0.1:9101",
        "PLATFORM_HEARTBEAT_INTERVAL": "3",
        "PLATFORM_RENEW_INTERVAL": "0.1",
        "PLATFORM_WORKER_TTL": "6",
        "PLATFORM_LOST_AFTER": "6",
        "PLATFORM_START_TIMEOUT": "1.5",
        "PLATFORM_DUE_INTERVAL": ".1",
        "PLATFORM_SHARE_HALF_LIFE": "3600",
        "PLATFORM_RESERVE_AFTER": "90",
        "PLATFORM_SWEEP_INTERVAL": "1",
        "PLATFORM_RECONCILE_INTERVAL": "30",
        "PLATFORM_RUNNER_TERM": "0.5",
        "PLATFORM_CONFIRM_INTERVAL": "0.5",
        "PLATFORM_STORE_TIMEOUT": "4",
        "PLATFORM_TOMBSTONE": "6",
        "PLATFORM_WRITE_WITHIN": "2",
        "PLATFORM_KEEP_FINISHED": "86400",
        "PLATFORM_KEEP_ARCHIVED": "63072000",
        "PLATFORM_FAIL_INFEASIBLE_AFTER": "600",
        "PLATFORM_AGEING": "60",
        "PLATFORM_SHUTDOWN_GRACE": "50",
        "PLATFORM_LABELS": "disk=ssd, arch=aarch64",
        "PLATFORM_PLACEMENT": "spread",
        "PLATFORM_HEALTH_DIR": "/run/health",
        "PLATFORM_LOCK_DIR": "/var/lib/locks",
    }
    assert set(environ) == {meaning.env for _, meaning in described()}
    assert Settings.from_environ(environ) == Settings(
        redis_url="redis://:s3cret@host:6379/0",
        database_url="postgresql+psycopg2://user:s3cret@host/db",
        direct_database_url="postgresql+psycopg2://user:s3cret@server/db",
        broker_url="amqp://host",
        result_backend="db+sqlite://",
        node_name="node-1",
        tenant="physics",
        cpus=500,
        memory=2 * 1024**3,
        reserved_memory=512 * 1024**2,
        gpus=2,
        resources={"licence": 3, "scratch": 200},
        labels={"arch": "aarch64", "disk": "ssd"},
        placement="spread",
        default_cpus=0,
        max_message=2 * 1024**2,
        max_backlog=1000,
        max_ledger_backlog=20_000,
        backfill_depth=2,
        most_losses=2,
        lifetime=28_800.0,
        learn_run_times=True,
        requests=Path("/srv/requests.toml"),
        imports=("tasks", "jobs.nightly"),
        home=Path("/srv/home"),
        dashboard=("::1", 0),
        token="0123456789abcdef",
        viewer_token="fedcba9876543210",
        proxy_user_header="x-forwarded-user",
        keep_audit=86_400.0,
        log_format="json",
        keep_logs=500,
        traces=True,
        worker_metrics=("127.0.0.1", 9101),
        heartbeat_interval=3.0,
        renew_interval=0.1,
        worker_ttl=6.0,
        lost_after=6.0,
        start_timeout=1.5,
        due_interval=0.1,
        share_halves_in=3600.0,
        reserve_after=90.0,
        sweep_interval=1.0,
        reconcile_interval=30.0,
        runner_term=0.5,
        confirm_interval=0.5,
        store_timeout=4.0,
        tombstone=6.0,
        write_within=2.0,
        keep_finished=86_400.0,
        keep_archived=63_072_000.0,
        fail_infeasible_after=600.0,
        ageing=60.0,
        shutdown_grace=50.0,
        health_dir=Path("/run/health"),
        lock_dir=Path("/var/lib/locks"),
    )


@pytest.mark.parametrize(
    ("value", "lifetime"),
    [
        ("7200", 7200.0),
        ("2h", 7200.0),
        ("2026-12-24T18:00:00+01:00", datetime(2026, 12, 24, 17, tzinfo=UTC)),
        ("2026-12-24T18:00", datetime(2026, 12, 24, 18).astimezone()),
    ],
)
def test_lifetime_is_a_duration_or_a_time(value: str, lifetime: float | datetime) -> None:
    assert Settings.from_environ({**URLS, "PLATFORM_LIFETIME": value}).lifetime == lifetime


def test_lifetime_of_another_form_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"PLATFORM_LIFETIME='until lunch' is not valid\. .* such as 7200 or 2h"):
        Settings.from_environ({**URLS, "PLATFORM_LIFETIME": "until lunch"})


def test_an_empty_variable_counts_as_not_set() -> None:
    environ = {meaning.env: "  " for _, meaning in described()}
    assert Settings.from_environ({**environ, "HOME": "/h"}) == Settings.from_environ({"HOME": "/h"})


def test_broker_and_results_follow_redis_unless_told_otherwise() -> None:
    settings = Settings.from_environ(URLS)
    assert settings.broker_url == settings.result_backend == settings.redis_url
    moved = settings.with_urls("redis://other/1", "postgresql://other/db")
    assert moved.broker_url == moved.result_backend == moved.redis_url == "redis://other/1"
    assert moved.database_url == "postgresql+psycopg2://other/db"
    kept = Settings.from_environ({**URLS, "CELERY_BROKER_URL": "amqp://host"})
    assert kept.with_urls("redis://other/1", "postgresql://other/db").broker_url == "amqp://host"
    embedded = Settings.from_environ({"CELERY_BROKER_URL": "amqp://host"})
    assert embedded.with_urls("redis://other/1", "postgresql://other/db").broker_url == "amqp://host"


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_a_database_url_gets_the_driver_that_is_used(scheme: str) -> None:
    settings = Settings.from_environ({**URLS, "DATABASE_URL": f"{scheme}://u@/db?host=/run/pg"})
    assert settings.database_url == "postgresql+psycopg2://u@/db?host=/run/pg"


WRONG = [
    ("REDIS_URL", "localhost:6379", "must be like redis://host:6379/0"),
    ("REDIS_URL", "unix://run/redis.sock", "must be like redis://host:6379/0"),
    ("REDIS_URL", "redis://host:port/0", "must be like redis://host:6379/0"),
    ("REDIS_URL", "redis://host/name", "must be like redis://host:6379/0"),
    ("REDIS_URL", "redis://[::1/0", "must be like redis://host:6379/0"),
    ("DATABASE_URL", "mysql://host/db", "must be like postgresql://user@host:5432/name"),
    ("DATABASE_URL", "postgresql://", "must be like postgresql://user@host:5432/name"),
    ("NODE_NAME", "a b", "1 to 100 characters"),
    ("NODE_NAME", "a:b", "1 to 100 characters"),
    ("PLATFORM_CPUS", "many", "a number from 0 to 1,000,000"),
    ("PLATFORM_CPUS", "0", "must be above 0"),
    ("PLATFORM_CPUS", "-1", "a number from 0 to 1,000,000"),
    ("PLATFORM_CPUS", "1e7", "a number from 0 to 1,000,000"),
    ("PLATFORM_DEFAULT_CPUS", "nan", "a number from 0 to 1,000,000"),
    ("PLATFORM_MEMORY", "2 potatoes", "'512MiB', '2GiB' or '1.5G'"),
    ("PLATFORM_GPUS", "1.5", "a whole number"),
    ("PLATFORM_RESOURCES", "licence", "must be like licence=3,scratch=200"),
    ("PLATFORM_RESOURCES", "licence=x", "a whole number"),
    ("PLATFORM_RESOURCES", "Licence=1", "1 to 64 characters of a-z"),
    ("PLATFORM_RESOURCES", "cpus=1", "Leave it out"),
    ("PLATFORM_RESOURCES", "a=1,a=2", "name each resource once"),
    ("PLATFORM_RESOURCES", ",".join(f"r{i}=1" for i in range(13)), "at most 12 resources"),
    ("PLATFORM_MAX_MESSAGE", "0", "from 1 to 536870912 bytes"),
    ("PLATFORM_MAX_MESSAGE", "1GiB", "from 1 to 536870912 bytes"),
    ("PLATFORM_MOST_LOSSES", "0", "from 1 to 1000 attempts"),
    ("PLATFORM_IMPORTS", "tasks.py/x", "names of modules"),
    ("PLATFORM_IMPORTS", "a..b", "names of modules"),
    ("PLATFORM_HOME", "state", "must be an absolute path"),
    ("PLATFORM_HOME", "~no-such-user/state", "must be an absolute path"),
    ("PLATFORM_DASHBOARD", "8000", "must be host:port"),
    ("PLATFORM_TOKEN", "tooshort", "must be 16 to 500 letters"),
    ("PLATFORM_TOKEN", "0123456789 abcdef", "must be 16 to 500 letters"),
    ("PLATFORM_VIEWER_TOKEN", "tooshort", "must be 16 to 500 letters"),
    ("PLATFORM_PROXY_USER_HEADER", "X User", "must be the name of a header"),
    ("PLATFORM_PROXY_USER_HEADER", "Cookie", "must not be a header with a secret"),
    ("PLATFORM_DASHBOARD", ":8000", "must be host:port"),
    ("PLATFORM_DASHBOARD", "host:99999", "must be host:port"),
    ("PLATFORM_DASHBOARD", "::1:8000", "must be host:port"),
    ("PLATFORM_DUE_INTERVAL", "soon", "must be a number of seconds"),
    ("PLATFORM_DUE_INTERVAL", "1_0", "must be a number of seconds"),
    ("PLATFORM_DUE_INTERVAL", "0", "must be from 0.001 to 31536000 seconds"),
    ("PLATFORM_KEEP_FINISHED", "-1", "must be from 0.001 to 31536000 seconds, or 0 for never"),
    ("PLATFORM_KEEP_ARCHIVED", "-1", "must be from 0.001 to 3153600000 seconds, or 0 for ever"),
    ("PLATFORM_DUE_INTERVAL", "-1", "must be from 0.001 to 31536000 seconds"),
    ("PLATFORM_DUE_INTERVAL", "nan", "must be from 0.001 to 31536000 seconds"),
    ("PLATFORM_DUE_INTERVAL", "inf", "must be from 0.001 to 31536000 seconds"),
]


@pytest.mark.parametrize(("env", "text", "right"), WRONG)
def test_a_wrong_setting_is_named_with_its_value_and_what_is_right(env: str, text: str, right: str) -> None:
    (problem,) = problems({**URLS, env: text})
    assert env in problem
    assert right in problem


def test_all_wrong_settings_stand_in_one_error() -> None:
    first_of_each = {env: text for env, text, _ in reversed(WRONG)}
    listed = problems({**URLS, **first_of_each})
    assert len(listed) == len(first_of_each)
    assert all(any(env in problem for problem in listed) for env in first_of_each)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ({}, "operators need a token of their own"),
        ({"PLATFORM_TOKEN": "0123456789abcdef"}, "viewers could act"),
    ],
)
def test_token_of_viewers_needs_another_one_of_operators(tokens: dict[str, str], said: str) -> None:
    (problem,) = problems({**URLS, **tokens, "PLATFORM_VIEWER_TOKEN": "0123456789abcdef"})
    assert said in problem
    assert "0123456789abcdef" not in problem


@pytest.mark.parametrize("there", ["REDIS_URL", "DATABASE_URL"])
def test_one_url_without_the_other_is_an_error(there: str) -> None:
    (problem,) = problems({there: URLS[there]})
    assert problem.startswith(f"{there} is set and ")
    assert "set both, or neither" in problem


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"PLATFORM_RENEW_INTERVAL": "60"}, ("PLATFORM_RENEW_INTERVAL=60", "PLATFORM_WORKER_TTL=60")),
        ({"PLATFORM_LOST_AFTER": "59.9"}, ("PLATFORM_LOST_AFTER=59.9", "PLATFORM_WORKER_TTL=60")),
    ],
)
def test_times_that_contradict_are_refused(environ: dict[str, str], names: tuple[str, str]) -> None:
    (problem,) = problems(environ)
    assert all(name in problem for name in names)


def test_a_time_that_is_wrong_by_itself_is_not_blamed_twice() -> None:
    (problem,) = problems({"PLATFORM_WORKER_TTL": "nan"})
    assert problem.startswith("PLATFORM_WORKER_TTL=nan")


def test_settings_made_by_hand_are_judged_too() -> None:
    settings = dataclasses.replace(Settings(), worker_ttl=6.0, lost_after=7.5, renew_interval=1.0)
    assert settings.worker_ttl == 6.0
    with pytest.raises(SettingsError, match=r"PLATFORM_LOST_AFTER=7\.5"):
        dataclasses.replace(settings, worker_ttl=8.0)
    with pytest.raises(SettingsError, match="DATABASE_URL is not"):
        Settings(redis_url="redis://host")
    with pytest.raises(InvalidRequest, match="REDIS_URL"):
        settings.with_urls("host", "postgresql://host/db")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("PLATFORM_CPU", "PLATFORM_CPUS"),
        ("PLATFORM_WORKERTTL", "PLATFORM_WORKER_TTL"),
        ("PLATFORM_HEARTBEAT", "PLATFORM_HEARTBEAT_INTERVAL"),
        ("PLATFORM_dashboard", "PLATFORM_"),
        ("PLATFORM_", "PLATFORM_"),
    ],
)
def test_an_unknown_name_is_a_warning_with_the_nearest_known_one(name: str, nearest: str) -> None:
    (warning,) = Settings.from_environ({name: "1", "PLATFORM_GPUS": "1", "PLATFORMS": "x"}).warnings
    assert warning.startswith(f"{name} is not a setting")
    assert nearest in warning.partition("nearest known one is")[2]


def test_file_of_a_platform_variable_is_no_unknown_name() -> None:
    assert Settings.from_environ({"PLATFORM_DIRECT_DATABASE_URL_FILE": ""}).warnings == ()


def test_passwords_are_not_shown() -> None:
    settings = Settings.from_environ({**URLS, "CELERY_RESULT_BACKEND": "db+postgresql://u:s3cret@h/db"})
    assert "s3cret" not in repr(settings)
    assert "redis://:***@host:6379/0" in repr(settings)
    assert not any("s3cret" in problem for problem in problems({**URLS, "DATABASE_URL": "mysql://u:s3cret@h/db"}))


def test_settings_go_to_another_process_unchanged() -> None:
    settings = Settings.from_environ({**URLS, "PLATFORM_RESOURCES": "a=1", "PLATFORM_X": "1"})
    again = pickle.loads(pickle.dumps(settings))
    assert again == settings
    assert again.warnings == settings.warnings


def test_every_field_but_the_warnings_is_described() -> None:
    names = [name for name, _ in described()]
    assert sorted(names) == sorted(f.name for f in dataclasses.fields(Settings) if f.name != "warnings")
    assert all(meaning.unit and meaning.text.endswith(".") for _, meaning in described())


def test_the_documented_defaults_are_the_defaults_and_can_be_written() -> None:
    computed = {"detected", "none", "for ever", "REDIS_URL", "DATABASE_URL", "the user's state folder/celery-capacity"}
    default = Settings.from_environ({})
    for name, meaning in described():
        if meaning.shown and meaning.shown not in computed:
            assert meaning.parse(meaning.shown, meaning.env) == getattr(default, name), name


# The home of the embedded servers, which the settings name.


@pytest.mark.parametrize(
    ("environ", "system", "folder"),
    [
        ({"HOME": "/home/ada"}, "linux", "/home/ada/.local/state/celery-capacity"),
        ({"HOME": "/home/ada", "XDG_STATE_HOME": "/state"}, "linux", "/state/celery-capacity"),
        ({"HOME": "/home/ada", "XDG_STATE_HOME": "state"}, "linux", "/home/ada/.local/state/celery-capacity"),
        ({"HOME": "/Users/ada"}, "darwin", "/Users/ada/Library/Application Support/celery-capacity"),
    ],
)
def test_the_default_home_is_the_user_s_state_folder(environ: dict[str, str], system: str, folder: str) -> None:
    assert embedded.default_home(environ, system) == Path(folder)


def write_servers(folder: Path, **changes: Any) -> None:
    described_pair = {
        "redis_url": "redis://127.0.0.1:6379/0",
        "database_url": "postgresql://postgres@/postgres?host=/run",
        "redis_pid": os.getpid(),
        "redis_ticks": process_identity.start_ticks(os.getpid()),
        "postgres_pid": os.getpid(),
        "postgres_ticks": process_identity.start_ticks(os.getpid()),
        "boot": process_identity.boot_id(),
        "data": str(folder),
        "version": "1.0.0",
        **changes,
    }
    (folder / "servers.json").write_text(json.dumps({k: v for k, v in described_pair.items() if v is not ...}))


def test_a_pair_runs_if_both_recorded_processes_live(tmp_path: Path) -> None:
    write_servers(tmp_path)
    pair = embedded.running_pair(tmp_path)
    assert pair is not None
    assert (pair.redis_url, pair.redis_pid, pair.data) == (
        "redis://127.0.0.1:6379/0",
        os.getpid(),
        str(tmp_path),
    )
    assert "127.0.0.1" not in repr(pair)


def test_a_pair_without_recorded_starts_needs_only_to_live(tmp_path: Path) -> None:
    write_servers(tmp_path, redis_ticks=..., postgres_ticks=None, boot=...)
    assert embedded.running_pair(tmp_path) is not None


@pytest.mark.parametrize("which", ["redis", "postgres"])
def test_a_pair_does_not_run_if_one_pid_belongs_to_another_process(tmp_path: Path, which: str) -> None:
    write_servers(tmp_path, **{f"{which}_ticks": 7})
    assert embedded.running_pair(tmp_path) is None


def test_a_pair_of_another_boot_does_not_run(tmp_path: Path) -> None:
    write_servers(tmp_path, boot="another:")
    assert embedded.running_pair(tmp_path) is None


def test_a_pair_runs_though_the_wall_clock_was_stepped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_servers(tmp_path)
    stepped = psutil.boot_time() + 3600
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: stepped)
    assert embedded.running_pair(tmp_path) is not None


@pytest.mark.parametrize("pid", [2**22 + 1, 0, -1])
def test_a_pair_does_not_run_if_a_process_is_gone(tmp_path: Path, pid: int) -> None:
    write_servers(tmp_path, redis_pid=pid, redis_ticks=None)
    assert embedded.running_pair(tmp_path) is None


def test_a_dead_process_that_nobody_waited_for_is_gone(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still there
        write_servers(tmp_path, redis_pid=pid, redis_ticks=None)
        assert embedded.running_pair(tmp_path) is None
    finally:
        os.waitpid(pid, 0)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"redis_pid": "x"}'])
def test_a_file_that_describes_no_pair_is_no_running_pair(tmp_path: Path, text: str) -> None:
    (tmp_path / "servers.json").write_text(text)
    assert embedded.running_pair(tmp_path) is None


def test_no_folder_no_pair(tmp_path: Path) -> None:
    assert embedded.running_pair(tmp_path / "nowhere") is None
    (tmp_path / "file").write_text("")
    assert embedded.running_pair(tmp_path / "file") is None


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "servers.json").mkdir()
    with pytest.raises(NoServers, match=r"servers\.json cannot be read"):
        embedded.running_pair(tmp_path)


def test_what_has_ended_may_be_kept_for_ever() -> None:
    assert Settings.from_environ({"PLATFORM_KEEP_FINISHED": "0"}).keep_finished == 0
