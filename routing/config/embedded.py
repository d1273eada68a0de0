"""Folder of the embedded servers, and the pair that runs there, if any. Nothing here starts anything."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celery_capacity.routing.config import process_identity
from celery_capacity.routing.errors import NoServers

#: file in the platform's home that names the running pair; the process that starts the servers writes it
SERVERS_FILE = "servers.json"


@dataclass(frozen=True)
class Pair:
    """A running pair of embedded servers. Starts are in clock ticks since the boot, None where not recorded."""

    redis_url: str = field(repr=False)
    database_url: str = field(repr=False)
    redis_pid: int
    postgres_pid: int
    redis_ticks: int | None = None
    postgres_ticks: int | None = None
    #: the boot and namespaces in which the pids and ticks count; None where not recorded
    boot: str | None = None
    #: folder with the servers' data
    data: str | None = None
    #: version of the platform that started them
    version: str | None = None


def default_home(environ: Mapping[str, str], system: str = sys.platform) -> Path:
    """Return the platform's folder in the user's state folder.

    The state folder is XDG_STATE_HOME or ~/.local/state, on macOS ~/Library/Application Support.
    """
    user = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    if system == "darwin":
        state = user / "Library" / "Application Support"
    else:
        named = Path(environ.get("XDG_STATE_HOME", ""))
        # The XDG specification ignores relative paths: they would name another folder for each caller.
        state = named if named.is_absolute() else user / ".local" / "state"
    return state / "celery-capacity"


def running_pair(home: Path) -> Pair | None:
    """Return the pair that servers.json names if both processes live and are the recorded ones, else None.

    Raises `NoServers` where the file is there and cannot be read.
    """
    path = home / SERVERS_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror})"
        raise NoServers(message, advice="Check whose file it is.") from error
    pair = _parse(text)
    if pair is None:
        return None
    if pair.boot is not None and pair.boot != process_identity.boot_id():
        return None
    over = process_identity.is_over(pair.redis_pid, pair.redis_ticks)
    return None if over or process_identity.is_over(pair.postgres_pid, pair.postgres_ticks) else pair


def _parse(text: str) -> Pair | None:
    """Return the pair that a file describes; None for any other file, such as an old version's or a torn one."""
    try:
        values: Any = json.loads(text)
        return Pair(
            redis_url=str(values["redis_url"]),
            database_url=str(values["database_url"]),
            redis_pid=int(values["redis_pid"]),
            postgres_pid=int(values["postgres_pid"]),
            redis_ticks=_ticks(values.get("redis_ticks")),
            postgres_ticks=_ticks(values.get("postgres_ticks")),
            boot=values.get("boot"),
            data=values.get("data"),
            version=values.get("version"),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _ticks(value: Any) -> int | None:
    return None if value is None else int(value)
