"""Base of the commands: the stores that a command works on, its help, and a readable end.

A mistake, a missing table or an unavailable store ends a command with one message and an exit code
(`workers.process.exit_codes`), never with a traceback. With `--json` the message is one `application/problem+json`
object on stdout, even if the command line itself is wrong.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import click
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError

from celery_capacity.platform.console.terminal import OutputLost, fail, print_json, talk
from celery_capacity.routing.config.settings import Settings
from celery_capacity.routing.database.postgres_errors import translate
from celery_capacity.routing.errors import PlatformError, StoreUnavailable
from celery_capacity.routing.ledger.replies import LedgerClosed
from celery_capacity.workers.process.exit_codes import Exit, code_of

if TYPE_CHECKING:
    from celery_capacity.workers.process.stores import Stores

#: Option of every command that prints facts.
json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")

#: Lines of help: the purpose of an example, and its command.
Examples = Sequence[tuple[str, str]]

#: Exit codes that every command can give.
ALWAYS: Final = (
    Exit.OK,
    Exit.USAGE,
    Exit.UNAVAILABLE,
    Exit.OUTPUT,
    Exit.CONFIGURATION,
    Exit.INTERRUPTED,
    Exit.BROKEN_PIPE,
)


class WrongUsage(PlatformError):
    """The command line is wrong."""

    reference = "usage"
    title = "the command line is wrong"
    status = 400


class Command(click.Command):
    """A command whose help ends with examples and exit codes, and which ends with one of these codes.

    `codes`: meanings of exit codes of this command that differ from their usual meanings. `never`: the common exit
    codes that this command never gives.
    """

    def __init__(
        self,
        *arguments: Any,
        examples: Examples = (),
        codes: Mapping[Exit, str] | None = None,
        never: Sequence[Exit] = (),
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.examples = examples
        meanings = {**{code: code.meaning for code in ALWAYS if code not in never}, **(codes or {})}
        self.codes = dict(sorted(meanings.items()))

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, self.examples)
        with formatter.section("Exit codes"):
            formatter.write_dl([(f"{code:<3} {code.name}", text) for code, text in self.codes.items()])

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        as_json = "--json" in args
        try:
            with _written():  # for the output of --help
                return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            if not as_json:
                raise
            name = error.ctx.command_path.rpartition("celery ")[2] if error.ctx is not None else info_name
            advice = f"`celery -A platform {name} --help` says what is right."
            print_json(WrongUsage(error.format_message(), advice=advice).to_problem())
            raise SystemExit(Exit.USAGE) from error

    def invoke(self, context: click.Context) -> Any:
        if getattr(context.obj, "no_color", False):
            os.environ["NO_COLOR"] = "1"  # Celery's --no-color, for this process and its children
        with _written(), _interruptible(), answering(bool(context.params.get("as_json"))):
            return super().invoke(context)


class Group(click.Group):
    """A group of commands, whose help ends with examples."""

    def __init__(self, *arguments: Any, examples: Examples = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.examples = examples

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(formatter, self.examples)


def write_examples(formatter: click.HelpFormatter, examples: Examples) -> None:
    """Write the section of examples. Each command has a line that can be copied whole."""
    with formatter.section("Examples"):
        for what, line in examples:
            formatter.write(f"  {what}:\n    {line}\n")


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
        _end(StoreUnavailable(f"Redis does not answer: {error}"), as_json, error)
    except DBAPIError as error:
        _end(translate(error), as_json, error)


@contextmanager
def _written() -> Iterator[None]:
    """End quietly after Ctrl-C or when no reader is left, and with a message when the output cannot be written."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(Exit.INTERRUPTED) from None
    except BrokenPipeError:
        _forsake(sys.stdout)
        _forsake(sys.stderr)
        raise SystemExit(Exit.BROKEN_PIPE) from None
    except OutputLost as error:
        _forsake(sys.stdout)
        with suppress(OutputLost):  # standard error may lie on the same disk
            talk().print(f"Error: {error}", soft_wrap=True)
        raise SystemExit(Exit.OUTPUT) from None


def _forsake(stream: Any) -> None:
    """Redirect a stream to /dev/null, so that its buffered rest does not fail again when the interpreter ends."""
    if stream is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process at once, also while the driver waits for Postgres.

    Python's own handler is not called during such a wait. Ctrl-C then acts like a kill, and every command may be
    killed. Commands with children install their own handler.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # ignored, as by `nohup`, or a handler of somebody else
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stores_of(context: click.Context) -> Stores:
    """Return the stores of the app that `-A` names. Raise WrongUsage if the app is not on the platform."""
    from celery_capacity.workers.app.install import platform_of

    app: Any = context.obj.app
    try:
        stores = platform_of(app)
    except PlatformError as error:
        raise WrongUsage(error.message, advice=error.advice) from error
    _warn(stores.settings)
    return stores


def settings_of_environment() -> Settings:
    """Return the settings, for a command that needs no app. Raise SettingsError.

    A name that looks mistyped gives a warning.
    """
    settings = Settings.from_environ(os.environ)
    _warn(settings)
    return settings


def _warn(settings: Settings) -> None:
    for warning in settings.warnings:
        talk().print(f"Warning: {warning}", soft_wrap=True)


def _end(error: PlatformError, as_json: bool, cause: Exception | None = None) -> None:
    if cause is not None:
        error.__cause__ = cause
    fail(error, as_json)
    raise SystemExit(exit_code(error)) from error


def exit_code(error: PlatformError) -> Exit:
    """Return the exit code of a command that ends with this error."""
    return Exit.USAGE if isinstance(error, WrongUsage) else code_of(error)
