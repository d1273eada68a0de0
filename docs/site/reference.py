"""Generated blocks of the documents: options, settings, errors, signatures, reasons, crashes, as the code has them.

`make reference` writes them, and the schemas of what the commands print.

A block stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`. Everything around it is written by hand. A test
compares the pages with the blocks.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import click

import celery_capacity
from celery_capacity import routing
from celery_capacity.platform.console.wording import MEANINGS
from celery_capacity.routing.config.settings import described
from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.model.reasons import EXPLAINED, Reason
from celery_capacity.workers.plugin import COMMANDS, SCRIPT
from celery_capacity.workers.process.exit_codes import Exit
from docs.site import schemas

DOCS: Final = Path(__file__).resolve().parents[1]
BLOCK: Final = "<!-- {0}:begin -->\n{1}\n<!-- {0}:end -->"
#: Characters of a signature on one line.
SIGNATURE_WIDTH: Final = 100
#: Line that has the tests of the documents leave a block out.
NOT_RUN: Final = "<!-- not run: a signature -->"
#: Classes of which the page lists the methods.
LISTED: Final = ("Job", "Request")

Blocks = dict[str, str]


def table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


# -- commands


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command with its name; of a group, the commands in it."""
    for stand_in in COMMANDS:
        command = stand_in.load()
        if isinstance(command, click.Group):
            yield from ((f"{stand_in.name} {name}", command.commands[name]) for name in command.commands)
        else:
            yield str(stand_in.name), command


def usage(name: str, command: click.Command) -> str:
    """Return the usage of a command, and a table of its options."""
    context = click.Context(command, info_name=f"{SCRIPT} {name}", terminal_width=1000)
    line = command.get_usage(context).removeprefix("Usage: ")
    options = [option for option in command.params if isinstance(option, click.Option)]
    rows = ([_written(option, context), _means(name, option)] for option in options)
    return f"Usage: `{line}`\n\n{table(('option', 'means'), rows)}"


def _written(option: click.Option, context: click.Context) -> str:
    """Return an option as it is typed: each of its names, and the value behind the last."""
    record = option.get_help_record(context)
    assert record is not None, option.name
    return ", ".join(f"`{text}`" for text in record[0].split(", "))


def _means(name: str, option: click.Option) -> str:
    text = option.help or ""
    if option.name != "as_json":
        return text
    schema = f"schemas/{name.replace(' ', '-')}.json"
    return f"{text} Its shape: [`{schema}`]({schema})."


def of_commands() -> Blocks:
    return {name.replace(" ", "-"): usage(name, command) for name, command in commands()}


def of_exit_codes() -> Blocks:
    codes = ([str(code.value), f"`{code.name}`", code.meaning, code.when] for code in Exit)
    endings = (
        [f"`{name}`", ", ".join(str(code.value) for code in getattr(command, "codes", (Exit.OK, Exit.USAGE)))]
        for name, command in commands()
    )
    return {
        "codes": table(("code", "name", "means", "comes when"), codes),
        "commands": table(("command", "gives"), endings),
    }


# -- settings


def of_settings() -> Blocks:
    rows = (
        [f"`{meaning.env}`", f"`{name}`", meaning.shown or "not set", meaning.unit, meaning.text]
        for name, meaning in described()
    )
    return {"settings": table(("variable", "field", "default", "unit", "meaning"), rows)}


# -- errors


def text_of(thing: Any) -> str:
    """Return the docstring of something as one paragraph."""
    return " ".join((inspect.getdoc(thing) or "").split())


def kinds(base: type[PlatformError]) -> Iterator[type[PlatformError]]:
    """Yield all kinds of an error, each before its own kinds."""
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


def _row(kind: type[PlatformError], name: str) -> list[str]:
    bases = [base.__name__ for base in kind.__bases__ if base is not PlatformError]
    also = f" A kind of {' and '.join(f'`{base}`' for base in bases)}." if name and bases else ""
    return [*filter(None, [name]), f"`{kind.reference}`", str(kind.status), f"{text_of(kind)}{also}"]


def of_errors() -> Blocks:
    schemas.load_platform()
    public = [kind for kind in kinds(PlatformError) if kind.__name__ in celery_capacity.__all__]
    other = [
        kind
        for kind in kinds(PlatformError)
        if kind not in public and kind.__module__.startswith("celery_capacity.platform") and "reference" in vars(kind)
    ]
    return {
        "errors": table(
            ("error", "reference", "status", "raised when"), (_row(kind, f"`{kind.__name__}`") for kind in public)
        ),
        "errors-of-commands": table(
            ("reference", "status", "means"),
            (_row(kind, "") for kind in sorted(other, key=lambda kind: kind.reference)),
        ),
    }


# -- the protocol


def of_protocol() -> Blocks:
    """Return the table of crashes, which stands at the top of the package that owns the protocol."""
    lines = (routing.__doc__ or "").splitlines()
    begin, head, end = (number for number, line in enumerate(lines) if line.startswith("====") and "  " in line)
    starts = [match.start() for match in re.finditer("=+", lines[begin])]
    edges = list(pairwise([*starts, None]))
    crashes: list[list[str]] = []
    for line in lines[head + 1 : end]:
        cells = [line[left:right].strip() for left, right in edges]
        if cells[0]:
            crashes.append(cells)
        else:
            crashes[-1][1] += f" {cells[1]}"
    header = [lines[begin + 1][left:right].strip() for left, right in edges]
    return {"crashes": table(header, iter(crashes))}


# -- reasons


def of_reasons() -> Blocks:
    """Return the table of the reasons to wait, in the order of `Reason`."""
    rows = (
        [f"`{reason.value}`", *MEANINGS[reason]] for reason in EXPLAINED if reason not in (Reason.RUNS, Reason.ENDED)
    )
    return {"reasons": table(("`why`", "it says", "it means", "what to do"), rows)}


# -- the API


class _Bare(str):
    """A default that is shown as a name."""

    def __repr__(self) -> str:
        return str(self)


def signature(name: str, thing: Any) -> str:
    """Return a name with its parameters and their defaults, without types; a long one with a line for each."""
    parameters = []
    for parameter in inspect.signature(thing).parameters.values():
        default = parameter.default
        if default is not inspect.Parameter.empty and callable(default):
            parameter = parameter.replace(default=_Bare(default.__name__))
        parameters.append(parameter.replace(annotation=inspect.Parameter.empty))
    line = f"{name}{inspect.Signature(parameters)}"
    if len(line) <= SIGNATURE_WIDTH:
        return line
    return "\n".join((f"{name}(", *(f"    {parameter}," for parameter in parameters), ")"))


def has_usual_arguments(name: str) -> bool:
    """Return True for an error that takes the arguments of `PlatformError`."""
    thing = getattr(celery_capacity, name)
    if not isinstance(thing, type) or not issubclass(thing, PlatformError) or thing is PlatformError:
        return False
    return inspect.signature(thing) == inspect.signature(PlatformError)


def members(name: str) -> Iterator[list[str]]:
    """Yield the public methods and properties of a class: as they are written, and what they do."""
    for member, value in vars(getattr(celery_capacity, name)).items():
        if member.startswith("_") or not (callable(value) or isinstance(value, property | classmethod)):
            continue
        if isinstance(value, property):
            yield [f"`{member}`", text_of(value)]
            continue
        shown = f"{name}.{member}" if isinstance(value, classmethod) else member
        function = getattr(getattr(celery_capacity, name), member)
        parameters = list(inspect.signature(function).parameters.values())[0 if isinstance(value, classmethod) else 1 :]
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
        yield [f"`{shown}{inspect.Signature(bare)}`", text_of(value)]


def of_api() -> Blocks:
    blocks = {
        name: f"{NOT_RUN}\n```python\n{signature(name, getattr(celery_capacity, name))}\n```"
        for name in celery_capacity.__all__
        if not has_usual_arguments(name)
    }
    lists = {f"{name}-members": table(("method, attribute", "does"), members(name)) for name in LISTED}
    return {**blocks, **lists}


# -- the documents of the commands


def of_documents() -> Blocks:
    """Return the table of all documents, and a table of fields for each object."""
    header = ("field", "type", "means")
    objects = []
    for name, text, fields in schemas.objects():
        objects.append(f"### {name}\n\n{text}" + (f"\n\n{table(header, iter(fields))}" if fields else ""))
    return {
        "documents": table(("command", "document", "is"), schemas.documents()),
        "objects": "\n\n".join(objects),
    }


#: Pages, and what makes their blocks.
PAGES: Final[Mapping[str, Callable[[], Blocks]]] = {
    "explanation/protocol.md": of_protocol,
    "explanation/why-does-it-wait.md": of_reasons,
    "reference/api.md": of_api,
    "reference/commands.md": of_commands,
    "reference/errors.md": of_errors,
    "reference/exit-codes.md": of_exit_codes,
    "reference/json.md": of_documents,
    "reference/settings.md": of_settings,
}


def filled(page: str, blocks: Blocks) -> str:
    """Return the text of a page with its blocks made anew. Raises ValueError unless it has a place for each of them."""
    places = re.findall(r"^<!-- ([\w-]+):begin -->$", page, re.MULTILINE)
    if sorted(places) != sorted(blocks):
        wrong = sorted({*places} ^ {*blocks}) or sorted(places)
        raise ValueError(f"each block has one place on its page, and each place a block: {', '.join(wrong)}")
    for name, text in blocks.items():
        begin, end = (f"<!-- {name}:{edge} -->" for edge in ("begin", "end"))
        before, _, rest = page.partition(begin)
        if end not in rest:
            raise ValueError(f"the block {name} has no end")
        page = f"{before}{BLOCK.format(name, text)}{rest.partition(end)[2]}"
    return page


def main() -> None:
    """Make all blocks and schemas anew, and say which files changed."""
    for name, blocks in PAGES.items():
        path = DOCS / name
        before = path.read_text(encoding="utf-8")
        after = filled(before, blocks())
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path.name} has changed")
    for file in schemas.write():
        print(f"schemas/{file} has changed")


if __name__ == "__main__":
    main()
