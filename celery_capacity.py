"""The public names of the platform.

    from celery_capacity import create_app

    app = create_app()
    app.send_task("demo.sleep", args=[1.0], cpus=4, memory="2GiB")

`create_app` makes a Celery app whose tasks are placed by capacity, `install` does it to an app that exists,
`Request` is what a job asks for, `fenced` commits a task's rows together with the end of its job, `job` is a job that
asyncio programs wait for (a `Job`, whose states are `JobEvent`s), and the rest are the errors, all derived from
`PlatformError`:

    PlatformError
    ├── IllegalTransition a job cannot do this in its state
    ├── InvalidRequest   also a ValueError; nothing was written
    │   ├── MessageTooLarge  more bytes than are allowed
    │   └── MessageTooDeep   nested deeper than is allowed
    ├── LeaseLost        this attempt no longer holds its job
    ├── NameTaken        another live worker has this name
    ├── NoServers        no Redis and Postgres are named or running
    ├── NotAccepted      nothing was written; submit again
    │   └── BacklogFull      more jobs wait than are allowed
    ├── NotMigrated      the tables are missing or of another version
    ├── OutcomeUnknown   it may have been written; the error has the job's id
    ├── PartlyAccepted   of many jobs some were accepted, then one was not
    ├── SettingsError    every wrong setting at once
    ├── StoreUnavailable Redis or Postgres does not answer
    └── Unsupported      a feature of Celery that the platform does not carry out yet

Importing this module opens no connection, starts no thread and loads no Celery: the names are looked up when
they are used. It checks one thing at once: that `workers`, `routing` and `migrations` are ours.
`ModuleHidden` says when they are not.
"""

from __future__ import annotations

import sys as _sys
from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from routing.errors import (
        BacklogFull,
        IllegalTransition,
        InvalidRequest,
        LeaseLost,
        MessageTooDeep,
        MessageTooLarge,
        NameTaken,
        NoServers,
        NotAccepted,
        NotMigrated,
        OutcomeUnknown,
        PartlyAccepted,
        PlatformError,
        SettingsError,
        StoreUnavailable,
        Unsupported,
    )
    from routing.request import Request
    from routing.watching import JobEvent
    from workers.app import create_app, install
    from workers.fenced import fenced
    from workers.jobs import Job, job

__all__ = [
    "BacklogFull",
    "IllegalTransition",
    "InvalidRequest",
    "Job",
    "JobEvent",
    "LeaseLost",
    "MessageTooDeep",
    "MessageTooLarge",
    "ModuleHidden",
    "NameTaken",
    "NoServers",
    "NotAccepted",
    "NotMigrated",
    "OutcomeUnknown",
    "PartlyAccepted",
    "PlatformError",
    "Request",
    "SettingsError",
    "StoreUnavailable",
    "Unsupported",
    "create_app",
    "fenced",
    "install",
    "job",
]

#: Where the names that are looked up when used come from; what is not here is an error and comes from
#: routing.errors.
_SOURCES = {
    "Job": "workers.jobs",
    "JobEvent": "routing.watching",
    "Request": "routing.request",
    "create_app": "workers.app",
    "fenced": "workers.fenced",
    "install": "workers.app",
    "job": "workers.jobs",
}

#: Our top-level packages that share their name with what projects like to call their own.
_PACKAGES = ("workers", "routing", "migrations")


class ModuleHidden(RuntimeError):
    """A module of the caller has the name of one of this platform's packages and is found before it.

    Not an ImportError: Celery swallows those while it looks for an app, and then says that `platform` has
    none.
    """

    def __init__(self, name: str, found: str, ours: _Path) -> None:
        self.name = name
        self.found = found
        self.ours = ours
        super().__init__(
            f"the module {name!r} of celery-capacity is hidden: Python finds {found} before {ours}. "
            f"Rename yours, move it into a package of its own, or start from a folder that does not hold it "
            f"(`python -m` and PYTHONPATH put a folder before all installed packages)."
        )


def _origin(name: str) -> str | None:
    """The file that `import <name>` gives or would give; the folders of a package that has no `__init__.py`;
    else None."""
    module = _sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is None:
        spec = _find_spec(name)
    if file := getattr(module, "__file__", None) or getattr(spec, "origin", None):
        return str(file)
    folders = getattr(module, "__path__", None) or getattr(spec, "submodule_search_locations", None)
    return ", ".join(folders) if folders else None


def _check_origins(names: tuple[str, ...] = _PACKAGES) -> None:
    """Raises ModuleHidden for the first of `names` that is not found beside this file.

    A wheel puts all of them into one folder, and an editable install leaves them in one: so where this module
    lies, they must.
    """
    for name in names:
        ours = _Path(__file__).resolve().parent / name / "__init__.py"
        found = _origin(name)
        if found is None or not ours.exists():
            continue  # incomplete, not hidden: the import itself says what is missing
        if _Path(found).resolve() != ours:
            _make_platform_findable()
            raise ModuleHidden(name, found, ours)


def _make_platform_findable() -> None:
    """Does the work of a hidden `workers.plugin`, so that `celery -A platform` comes as far as this error.

    Without it Celery would say that the standard library's `platform` has no app, which helps nobody.
    """
    import platform

    folder = str(_Path(__file__).resolve().parent / "platform")
    if folder not in getattr(platform, "__path__", ()):
        platform.__path__ = [*getattr(platform, "__path__", ()), folder]


_check_origins()


def _origins_command() -> _Any:
    """The command `celery -A platform origins`. Its entry point also has every `celery` command make the
    check above."""
    import json

    import click

    # By hand what other commands have from platform.edge, which needs modules that may be hidden.
    ends = (
        "\b\nExamples:\n"
        "  Where a module comes from that a traceback names:\n    celery -A platform origins\n"
        "  The same for a program:\n    celery -A platform origins --json\n\n"
        "\b\nExit codes:\n"
        "  0   OK             done, and the answer is yes\n  2   USAGE          the command line is wrong"
    )

    @click.command("origins", short_help="The files that this installation runs from.", epilog=ends)
    @click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
    def origins(as_json: bool) -> None:
        """Print the files that this installation runs from, one a line."""
        found = {name: _origin(name) for name in ("celery_capacity", *_PACKAGES)}
        if as_json:
            click.echo(json.dumps(found))
            return
        for name, file in found.items():
            click.echo(f"{name:<16}{file}")

    return origins


def __getattr__(name: str) -> _Any:
    if name == "_origins":
        return _origins_command()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Once more: `celery -A` puts the working folder before all others only after this module was loaded.
    _check_origins()
    value = getattr(_import_module(_SOURCES.get(name, "routing.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
