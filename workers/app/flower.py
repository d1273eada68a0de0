"""Flower on an app of the platform: it listens on this machine alone, and has a tab that leads to the dashboard.

Its pages show the amounts of tasks and workers (`workers/app/flower_amounts.py`). Its buttons work, or say why the
platform refuses. A rate limit, for one, is of the cluster, and not of a worker.

Flower is a plug-in of Celery, which imports it for every command if it is installed. So it is imported already when an
app is made, and nothing here imports it: a program that submits pays nothing.
"""

from __future__ import annotations

import sys
from html import escape
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from celery_capacity.routing.errors import PlatformError, SettingsError
from celery_capacity.workers.app import flower_amounts
from celery_capacity.workers.process.stores import Stores

#: Address where Flower listens unless FLOWER_ADDRESS, its file or --address say another.
LOOPBACK: Final = "127.0.0.1"
#: Template of Flower with its tabs, and the end of their list.
NAVBAR: Final = "navbar.html"
END_OF_TABS: Final = "      </ul>"
#: Template of the page of a task, and the condition of its button Revoke: Flower knows no jobs that wait.
TASK: Final = "task.html"
REVOCABLE: Final = 'task.state == "RECEIVED"'
ALSO_WAITING: Final = 'task.state in ("WAITING", "ADMITTED", "RECEIVED")'
#: Template of the page of a worker.
WORKER: Final = "worker.html"
#: Setting of Tornado for the loader of templates.
LOADER: Final = "template_loader"


def prepare(stores: Stores) -> None:
    """Change Flower's defaults where `celery` has imported it. Its options and its environment win over them."""
    command: Any = sys.modules.get("flower.command")
    if command is None:
        return
    command.options.address = LOOPBACK
    command.settings.setdefault(LOADER, _loader(command.settings["template_path"], stores))
    explain_refusals(sys.modules["flower.api"].BaseApiHandler)
    flower_amounts.ask_before_showing(sys.modules["flower.views.workers"].WorkerView)


def _loader(folder: str, stores: Stores) -> Any:
    """Return the loader of Flower's templates that adds the tab, amounts, and a button for jobs that wait.

    A template of another Flower, without the places of these, stays as it is.
    """
    from tornado.template import Loader, Template

    edits = {
        NAVBAR: lambda source: source.replace(END_OF_TABS, tab(page_of(stores)) + END_OF_TABS, 1),
        TASK: lambda source: flower_amounts.task_page(source.replace(REVOCABLE, ALSO_WAITING, 1)),
        WORKER: flower_amounts.worker_page,
    }

    edited: dict[str, Template] = {}

    class Edited(Loader):
        def load(self, name: str, parent_path: str | None = None) -> Template:
            if name not in edits:
                return super().load(name, parent_path)
            if name not in edited:
                source = (Path(folder) / name).read_text(encoding="utf-8")
                edited[name] = Template(edits[name](source), name=name, loader=self)
            return edited[name]

    return Edited(folder, namespace=flower_amounts.NAMESPACE)


def explain_refusals(handler: Any) -> None:
    """Have Flower's buttons show why the platform refuses an action. Flower alone shows an empty message.

    `handler`: the class of Flower that answers the buttons.
    """
    flowers_own = handler.write_error
    if flowers_own.__module__ == __name__:
        return

    def write_error(request: Any, status_code: int, **options: Any) -> None:
        if status_code == HTTPStatus.UNAUTHORIZED and request.application.options.basic_auth:
            # A browser that opened the page of a worker first shows its login for the buttons only when it is asked.
            request.set_header("WWW-Authenticate", 'Basic realm="flower"')
        # Flower raises an error of HTTP from the one that the action raised.
        _, error, _ = options.get("exc_info") or (None, None, None)
        refusal = getattr(error, "__cause__", None)
        if not isinstance(refusal, PlatformError):
            flowers_own(request, status_code, **options)
            return
        request.set_status(refusal.status)
        request.set_header("Content-Type", "text/plain; charset=UTF-8")
        request.finish(str(refusal))

    handler.write_error = write_error


def page_of(stores: Stores) -> str:
    """Return the address of the dashboard's page, by its settings; the usual one where these are wrong."""
    try:
        host, port = stores.settings_without_servers().dashboard
    except SettingsError:
        host, port = LOOPBACK, 8000
    name = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"


def tab(url: str) -> str:
    """Return the tab. It leads out of Flower, to a page that asks for its own token."""
    # Two opening braces would begin an expression of the template.
    address = escape(url).replace("{", "%7B")
    return (
        '        <li class="nav-item">\n'
        f'          <a class="nav-link" href="{address}" rel="noreferrer">Capacity</a>\n'
        "        </li>\n"
    )
