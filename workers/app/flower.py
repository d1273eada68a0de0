"""Flower on an app of the platform: it listens on this machine alone, and has a tab that leads to the dashboard.

Flower is a plug-in of Celery, which imports it for every command if it is installed. So it is imported already when an
app is made, and nothing here imports it: a program that submits pays nothing.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import Any, Final

from celery_capacity.routing.errors import SettingsError
from celery_capacity.workers.process.stores import Stores

#: Address where Flower listens unless FLOWER_ADDRESS, its file or --address say another.
LOOPBACK: Final = "127.0.0.1"
#: Template of Flower with its tabs, and the end of their list.
NAVBAR: Final = "navbar.html"
END_OF_TABS: Final = "      </ul>"
#: Setting of Tornado for the loader of templates.
LOADER: Final = "template_loader"


def prepare(stores: Stores) -> None:
    """Change Flower's defaults where `celery` has imported it. Its options and its environment win over them."""
    command: Any = sys.modules.get("flower.command")
    if command is None:
        return
    command.options.address = LOOPBACK
    command.settings.setdefault(LOADER, _loader(command.settings["template_path"], stores))


def _loader(folder: str, stores: Stores) -> Any:
    """Return the loader of Flower's templates that adds the tab. Without its place in the template there is no tab."""
    from tornado.template import Loader, Template

    class WithTab(Loader):
        navbar: Template | None = None

        def load(self, name: str, parent_path: str | None = None) -> Template:
            if name != NAVBAR:
                return super().load(name, parent_path)
            if self.navbar is None:
                source = (Path(folder) / NAVBAR).read_text(encoding="utf-8")
                source = source.replace(END_OF_TABS, tab(page_of(stores)) + END_OF_TABS, 1)
                self.navbar = Template(source, name=NAVBAR, loader=self)
            return self.navbar

    return WithTab(folder)


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
