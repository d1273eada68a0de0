"""URLs from files: read like those of the environment, refused with the file's name, and never shown."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from celery_capacity.routing.config.secret_files import FROM_FILES, MAX_BYTES, NO_URL, SUFFIX
from celery_capacity.routing.config.settings import Settings, described
from celery_capacity.routing.errors import SettingsError

ROOT = Path(__file__).parents[4]
REDIS = "redis://:s3cret@host:6379/0"
DATABASE = "postgresql://user:s3cret@host/db"
#: A user who owns nothing.
NOBODY = 65534


def written(folder: Path, **contents: str | bytes) -> dict[str, str]:
    """Return an environment that names a file with this content for each variable."""
    environ = {}
    for env, content in contents.items():
        file = folder / env.lower()
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        environ[env + SUFFIX] = str(file)
    return environ


def problem(environ: dict[str, str]) -> str:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ(environ)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))
    (message,) = caught.value.problems
    return message


@pytest.mark.parametrize("end", ["", "\n", "\r\n", " \n\n"])
def test_urls_from_files_are_those_of_the_environment(tmp_path: Path, end: str) -> None:
    urls = {
        "REDIS_URL": REDIS,
        "DATABASE_URL": DATABASE,
        "PLATFORM_DIRECT_DATABASE_URL": DATABASE,
        "CELERY_BROKER_URL": "amqp://u:p@host//",
        "CELERY_RESULT_BACKEND": "rediss://host/1",
        "PLATFORM_TOKEN": "0123456789abcdef",
        "PLATFORM_VIEWER_TOKEN": "fedcba9876543210",
    }
    assert set(urls) == set(FROM_FILES)
    files = written(tmp_path, **{env: url + end for env, url in urls.items()})
    assert Settings.from_environ(files) == Settings.from_environ(urls)


def test_broker_and_results_follow_a_redis_url_from_a_file(tmp_path: Path) -> None:
    settings = Settings.from_environ(written(tmp_path, REDIS_URL=REDIS, DATABASE_URL=DATABASE))
    assert (settings.broker_url, settings.result_backend) == (REDIS, REDIS)
    assert settings.warnings == ()


def test_an_empty_path_counts_as_not_set(tmp_path: Path) -> None:
    environ = {"REDIS_URL_FILE": " ", "DATABASE_URL_FILE": "", "REDIS_URL": REDIS, "DATABASE_URL": DATABASE}
    assert Settings.from_environ(environ).redis_url == REDIS


def test_a_variable_and_its_file_are_not_both_set(tmp_path: Path) -> None:
    environ = {**written(tmp_path, REDIS_URL=REDIS), "REDIS_URL": REDIS, "DATABASE_URL": DATABASE}
    assert problem(environ) == (
        f"REDIS_URL is set and REDIS_URL_FILE={environ['REDIS_URL_FILE']} too. Set one of them."
    )


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    message = problem({"REDIS_URL": REDIS, "DATABASE_URL_FILE": str(tmp_path / "gone")})
    assert message.startswith(f"DATABASE_URL_FILE={tmp_path}/gone cannot be read: No such file or directory.")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/", "cannot be read: Is a directory"),
        ("secrets/url", "is not an absolute path"),
        ("/a\0b", "cannot be read: it is no path"),
        ("/dev/zero", "does not hold one URL"),
    ],
)
def test_file_without_a_url_is_refused(path: str, says: str) -> None:
    assert f"REDIS_URL_FILE={path} {says}" in problem({"REDIS_URL_FILE": path, "DATABASE_URL": DATABASE})


@contextmanager
def an_ordinary_user() -> Iterator[None]:
    """Read as an ordinary user meanwhile, since root reads every file."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    environ = {**written(tmp_path, REDIS_URL=REDIS), "DATABASE_URL": DATABASE}
    Path(environ["REDIS_URL_FILE"]).chmod(0)
    with an_ordinary_user():
        message = problem(environ)
    assert message.startswith(f"REDIS_URL_FILE={tmp_path}/redis_url cannot be read: Permission denied. The user of")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        (f"{REDIS}\nredis://:s3cret@other", "does not hold one URL and nothing else"),
        ("-----BEGIN PRIVATE KEY----- s3cret", "does not hold one URL and nothing else"),
        ("s3cret", "does not hold one URL and nothing else"),
        (b"\xffs3cret\0", "does not hold one URL and nothing else"),
        (f"redis://{'s3cret' * MAX_BYTES}", "does not hold one URL and nothing else"),
        ("http://user:s3cret@host/s3cret", "what the file holds is not valid. REDIS_URL must be like redis://"),
        ("redis://:s3cret@host:s3cret/0", "what the file holds is not valid. REDIS_URL must be like redis://"),
    ],
)
def test_a_wrong_content_is_refused_and_not_shown(tmp_path: Path, content: str | bytes, says: str) -> None:
    message = problem({**written(tmp_path, REDIS_URL=content), "DATABASE_URL": DATABASE})
    assert message.startswith(f"REDIS_URL_FILE={tmp_path}/redis_url")
    assert says in message


@pytest.mark.parametrize("env", ["CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"])
def test_url_that_celery_would_take_unread_is_checked_from_a_file(tmp_path: Path, env: str) -> None:
    environ = {**written(tmp_path, **{env: "s3cret and more"}), "REDIS_URL": REDIS, "DATABASE_URL": DATABASE}
    assert "does not hold one URL and nothing else" in problem(environ)


def test_only_urls_are_read_from_files(tmp_path: Path) -> None:
    environ = written(tmp_path, PLATFORM_CPUS="4")
    settings = Settings.from_environ(environ)
    assert settings.cpus is None
    assert settings.warnings[0].startswith("PLATFORM_CPUS_FILE is not a setting")


def test_the_docs_name_the_files_and_they_are_the_settings_that_are_urls() -> None:
    page = (ROOT / "docs/reference/settings.md").read_text(encoding="utf-8")
    section = page.partition("## URLs in files\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)_FILE`", section)) == set(FROM_FILES)
    assert {meaning.env for _, meaning in described() if meaning.unit == "URL"} == set(FROM_FILES) - NO_URL
