"""Where a command meets the person who typed it: the stores it works on, and errors that read well.

A mistake, a missing table or a store that is down ends a command with one message and an exit code of
`exits`, never with a traceback; with `--json` the message is one `application/problem+json` object on stdout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError

from platform import exits
from platform.terminal import fail
from routing.errors import PlatformError, StoreUnavailable
from routing.postgres import translate
from routing.replies import LedgerClosed

if TYPE_CHECKING:
    from workers.stores import Stores

#: The option of every command that prints facts.
json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")


@contextmanager
def answering(as_json: bool) -> Iterator[None]:
    """Turn errors of the platform and of its stores into a message and an exit code."""
    try:
        yield
    except PlatformError as error:
        _end(error, as_json)
    except LedgerClosed as error:
        advice = "It is being opened again; repeat the command in some seconds."
        _end(StoreUnavailable(str(error), advice=advice), as_json)
    except RedisError as error:
        _end(StoreUnavailable(f"Redis does not answer: {error}"), as_json)
    except DBAPIError as error:
        _end(translate(error), as_json)


def stores_of(context: click.Context) -> Stores:
    """The stores of the app that `-A` names. Raises PlatformError where it is not on the platform."""
    from workers.app import platform_of

    app: Any = context.obj.app
    return platform_of(app)


def _end(error: PlatformError, as_json: bool) -> None:
    fail(error, as_json)
    raise SystemExit(exits.code_of(error)) from error
