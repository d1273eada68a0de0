"""Token of operators where no setting has one: made at the first start, and kept in a file that only its user reads."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path
from typing import Final

from celery_capacity.routing.config.setting_values import SHORTEST_TOKEN

NAME: Final = "dashboard-token"
#: Random bytes of a token.
BYTES: Final = 24


def read_or_make(home: Path) -> tuple[str, Path, bool] | None:
    """Return the token, its file, and True where it was made now; None where the folder cannot be written.

    A file that others may read, or with something else in it, is replaced.
    """
    path = home / NAME
    try:
        if (token := _read(path)) is not None:
            return token, path, False
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Dashboards that start at once take turns, so that all of them have the token that is in the file.
        folder = os.open(home, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            if (token := _read(path)) is not None:
                return token, path, False
            token, draft = secrets.token_hex(BYTES), home / f"{NAME}.{secrets.token_hex(4)}"
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(f"{token}\n")
            draft.replace(path)
        finally:
            os.close(folder)
    except (OSError, ValueError):
        return None
    return token, path, True


def _read(path: Path) -> str | None:
    """Return the token in a file that nobody else may read; None where there is none."""
    if not path.is_file() or path.stat().st_mode & 0o077:
        return None
    token = path.read_text(encoding="ascii").strip()
    return token if len(token) >= SHORTEST_TOKEN else None
