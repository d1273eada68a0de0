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
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import click

from celery_capacity.platform.console.terminal import OutputLost, fail, forsake, print_json, talk
from celery_capacity.routing.errors import PlatformError, StoreUnavailable
from celery_capacity.workers.logs import log_format
from celery_capacity.workers.plugin import SCRIPT
from celery_capacity.workers.process.exit_codes import Exit, code_of

if TYPE_CHECKING:
    from celery_capacity.routing.config.settings import Settings
    from celery_capacity.workers.process.stores import Stores

#: Option of every command that prints facts.
json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")

#: Option of every command that runs until it is ended.
log_format_option: Final = click.option("--log-format", **log_format.OPTION)

#: Lines of help: the purpose of an example, and its command.
Examples = Sequence[tuple[str, str]]

#: The words before a command, in the examples of its help.
PROGRAM: Final = "celery -A platform"

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


class Invocation:
    """Global options of `capacity`. It stands where Celery's commands have their `CLIContext`."""

    def __init__(self, no_color: bool) -> None:
        self.no_color = no_color

    @cached_property
    def app(self) -> Any:
        """Return the app of `celery -A platform`. It imports Celery, so a command asks for it only if it needs it."""
        from celery.app.utils import find_app

        return find_app("platform")

    @cached_property
    def stores(self) -> Stores:
        """Return stores like those of the app, without the app."""
        from celery_capacity.workers.process.stores import Stores

        return Stores()


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
        write_examples(context, formatter, self.examples)
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
            command = str(info_name) if error.ctx is None else error.ctx.command_path
            root = "" if error.ctx is None else error.ctx.find_root().info_name or ""
            command = command if " -A " in root or root == SCRIPT else f"{PROGRAM} {command}"
            advice = f"`{command} --help` says what is right."
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
        write_examples(context, formatter, self.examples)


def write_examples(context: click.Context, formatter: click.HelpFormatter, examples: Examples) -> None:
    """Write the section of examples. Each command has a line that can be copied whole, with the words of the caller."""
    with formatter.section("Examples"):
        for what, line in examples:
            formatter.write(f"  {what}:\n    {line.replace(PROGRAM, program(context))}\n")


def program(context: click.Context) -> str:
    """Return the words before the command, as they were typed: "celery -A platform", "capacity"."""
    root = context.find_root()
    return (root.info_name if root is not context else None) or PROGRAM


@contextmanager
def answering(as_json: bool) -> Iterator[None]:
    """Turn errors of the platform and of its stores into a message and an exit code."""
    try:
        yield
    except click.exceptions.Exit:
        raise
    except Exception as error:
        problem = problem_of_store(error)
        if problem is None:
            raise
        if problem is not error:
            problem.__cause__ = error
        fail(problem, as_json)
        raise SystemExit(exit_code(problem)) from problem


def problem_of_store(error: Exception) -> PlatformError | None:
    """Return an error of the platform, or of a store's driver, as one of the platform; None for any other error."""
    if isinstance(error, PlatformError):
        return error
    # Imported here: the help of a command needs no driver.
    from redis.exceptions import RedisError
    from sqlalchemy.exc import DBAPIError

    from celery_capacity.routing.database.postgres_errors import translate
    from celery_capacity.routing.ledger.replies import LedgerClosed

    if isinstance(error, LedgerClosed):
        return StoreUnavailable(str(error), advice="It is being opened again; repeat the command in some seconds.")
    if isinstance(error, RedisError):
        return StoreUnavailable(f"Redis does not answer: {error}")
    return translate(error) if isinstance(error, DBAPIError) else None


@contextmanager
def _written() -> Iterator[None]:
    """End quietly after Ctrl-C or when no reader is left, and with a message when the output cannot be written."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(Exit.INTERRUPTED) from None
    except BrokenPipeError:
        forsake(sys.stdout)
        forsake(sys.stderr)
        raise SystemExit(Exit.BROKEN_PIPE) from None
    except OutputLost as error:
        forsake(sys.stdout)
        with suppress(OutputLost):  # standard error may lie on the same disk
            talk().print(f"Error: {error}")
        raise SystemExit(Exit.OUTPUT) from None


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
    """Return the stores of the app that `-A` names. Raise WrongUsage if the app is not on the platform.

    Without `-A`, the script `capacity` needs no app for that, and so imports no Celery.
    """
    if isinstance(context.obj, Invocation):
        stores = context.obj.stores
        _warn(stores.settings)
        return stores
    return stores_of_app(context)


def stores_of_app(context: click.Context) -> Stores:
    """Return the stores of the app, for a command that sends with the app. Raise WrongUsage as `stores_of` does.

    The app's submissions wait in the app's own stores, so no other stores can flush them.
    """
    from celery_capacity.workers.process.stores import platform_of

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
    from celery_capacity.routing.config.settings import Settings

    settings = Settings.from_environ(os.environ)
    _warn(settings)
    return settings


def _warn(settings: Settings) -> None:
    for warning in settings.warnings:
        talk().print(f"Warning: {warning}")


def exit_code(error: PlatformError) -> Exit:
    """Return the exit code of a command that ends with this error."""
    return Exit.USAGE if isinstance(error, WrongUsage) else code_of(error)
