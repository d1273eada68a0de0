"""URLs that stand in files: what holds a password need not stand in the environment, where `docker inspect`, a crash
report or a child process shows it.

For each variable of `FROM_FILES` there is one named `<variable>_FILE`: the path of a file whose only line is the URL.
Secrets of Docker, Kubernetes and systemd are such files. What a file holds is never shown, not even with the password
masked: a wrong path may lead to any other secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from celery_capacity.routing.errors import InvalidRequest

#: The variables whose value may stand in a file.
FROM_FILES: Final = (
    "REDIS_URL",
    "DATABASE_URL",
    "PLATFORM_DIRECT_DATABASE_URL",
    "CELERY_BROKER_URL",
    "CELERY_RESULT_BACKEND",
)
SUFFIX: Final = "_FILE"
#: bytes; no URL is longer, and what is no text of ours (a device, a dump) is not read to its end
MOST_BYTES: Final = 64 * 1024

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")


def parsed(environ: Mapping[str, str], env: str, parse: Callable[[str, str], Any]) -> Any:
    """What the variable `env`, or the file that `<env>_FILE` names, says, as `parse` understands it; None where neither
    is set. Raises InvalidRequest, which never shows what a file holds."""
    text = environ.get(env, "").strip()
    path = environ.get(env + SUFFIX, "").strip() if env in FROM_FILES else ""
    if not path:
        return parse(text, env) if text else None
    named = f"{env}{SUFFIX}={path}"
    if text:
        raise InvalidRequest(f"{env} is set and {named} too", value=path, advice="Set one of them.")
    url = _read(named, path)
    try:
        return parse(url, env)
    except InvalidRequest as error:
        advice = error.advice
    # After the block, so that the error that shows the value is not even the context of this one.
    raise InvalidRequest(f"{named}: what the file holds is not valid", value=path, advice=advice)


def _read(named: str, path: str) -> str:
    file = Path(path)
    if not file.is_absolute():
        raise InvalidRequest(
            f"{named} is not an absolute path", value=path, advice="Commands from any folder must find the same file."
        )
    try:
        with file.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with the character NUL
        reason = getattr(error, "strerror", None) or "it is no path"
        raise InvalidRequest(
            f"{named} cannot be read: {reason}", value=path, advice="The user of this process must be able to read it."
        ) from None
    url = content.decode("utf-8", "replace").strip()
    if len(content) > MOST_BYTES or not _URL.fullmatch(url):
        found = "is empty" if not url else "does not hold one URL and nothing else"
        raise InvalidRequest(f"{named} {found}", value=path, advice="Write the URL into it, in one line.")
    return url
