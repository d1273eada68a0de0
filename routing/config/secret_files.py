"""URLs and the token that stand in files, so that a secret need not stand in the environment.

`docker inspect`, a crash report or a child process shows the environment.

Each variable of `FROM_FILES` has a second one named `<variable>_FILE`: the path of a file whose only line is the value.
Secrets of Docker, Kubernetes and systemd are such files. The content of a file is never shown, not even with the
password masked: a wrong path may lead to any other secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from celery_capacity.routing.errors import InvalidRequest

#: Variables whose value may stand in a file.
FROM_FILES: Final = (
    "REDIS_URL",
    "DATABASE_URL",
    "PLATFORM_DIRECT_DATABASE_URL",
    "CELERY_BROKER_URL",
    "CELERY_RESULT_BACKEND",
    "PLATFORM_TOKEN",
    "PLATFORM_VIEWER_TOKEN",
)
#: Variables of these whose value is no URL.
NO_URL: Final = frozenset({"PLATFORM_TOKEN", "PLATFORM_VIEWER_TOKEN"})
SUFFIX: Final = "_FILE"
#: bytes; no URL is longer, and a wrong file (a device, a dump) is not read to its end
MAX_BYTES: Final = 64 * 1024

_WORD: Final = re.compile(r"\S+")
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")


def parsed(environ: Mapping[str, str], env: str, parse: Callable[[str, str], Any]) -> Any:
    """Return the value of the variable `env`, or of the file that `<env>_FILE` names; None where neither is set.

    `parse` makes the value of the text. Raises InvalidRequest, which never shows the content of a file.
    """
    text = environ.get(env, "").strip()
    path = environ.get(env + SUFFIX, "").strip() if env in FROM_FILES else ""
    if not path:
        return parse(text, env) if text else None
    named = f"{env}{SUFFIX}={path}"
    if text:
        raise InvalidRequest(f"{env} is set and {named} too", value=path, advice="Set one of them.")
    content = _read(named, path, "token" if env in NO_URL else "URL")
    try:
        return parse(content, env)
    except InvalidRequest as error:
        advice = error.advice
    # Raise after the block, so that the error that shows the value is not even the context of this one.
    raise InvalidRequest(f"{named}: what the file holds is not valid", value=path, advice=advice)


def _read(named: str, path: str, kind: str) -> str:
    file = Path(path)
    if not file.is_absolute():
        raise InvalidRequest(
            f"{named} is not an absolute path", value=path, advice="Commands from any folder must find the same file."
        )
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with the character NUL
        reason = getattr(error, "strerror", None) or "it is no path"
        raise InvalidRequest(
            f"{named} cannot be read: {reason}", value=path, advice="The user of this process must be able to read it."
        ) from None
    value = content.decode("utf-8", "replace").strip()
    form = _URL if kind == "URL" else _WORD
    if len(content) > MAX_BYTES or not form.fullmatch(value):
        problem = "is empty" if not value else f"does not hold one {kind} and nothing else"
        raise InvalidRequest(f"{named} {problem}", value=path, advice=f"Write the {kind} into it, in one line.")
    return value
