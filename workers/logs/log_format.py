"""Option `--log-format` of the commands that run until they are ended, and the setting that it stands for."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Any, Final

import click

#: Variable of the setting, and its value that asks for such lines.
VARIABLE: Final = "PLATFORM_LOG_FORMAT"
JSON: Final = "json"
#: Option of a command. Its value goes into the environment, for children too.
OPTION: Final[dict[str, Any]] = {
    "type": click.Choice(["text", JSON], case_sensitive=False),
    "envvar": VARIABLE,
    "metavar": "FORMAT",
    "expose_value": False,
    "callback": lambda context, _, value: choose(context, value),
    "help": "Lines of the log: text, or a JSON object each.",
}


def is_asked_for(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Return True if the environment asks for lines in JSON."""
    return environ.get(VARIABLE, "").strip().lower() == JSON


def choose(context: click.Context, value: str | None) -> None:
    """Have this process and its children write such lines."""
    if value is None:
        return
    os.environ[VARIABLE] = value
    if value == JSON and hasattr(context.obj, "quiet"):
        # Celery's banners are no lines of a log.
        context.obj.quiet = True


def add_options(app: Any) -> None:
    """Give Celery's commands `worker` and `beat` the option, for this app."""
    for command in ("worker", "beat"):
        app.user_options[command].add(click.Option(["--log-format"], **OPTION))
