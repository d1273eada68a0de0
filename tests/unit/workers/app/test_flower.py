"""Flower on an app of the platform: where it listens, and the tab that leads to the dashboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import flower.command
import pytest
from tornado.options import options

from celery_capacity.routing.config.settings import Settings
from celery_capacity.workers.app.flower import END_OF_TABS, LOADER, NAVBAR, REVOCABLE, TASK, page_of, prepare, tab


def stores(dashboard: tuple[str, int] = ("127.0.0.1", 8000)) -> Any:
    return SimpleNamespace(settings_without_servers=lambda: Settings(dashboard=dashboard))


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    address, settings = options.address, dict(flower.command.settings)
    # An app of another test in this process may have prepared it.
    flower.command.settings.pop(LOADER, None)
    yield
    options.address = address
    flower.command.settings.clear()
    flower.command.settings.update(settings)


def test_flower_listens_on_this_machine_by_default() -> None:
    options.address = ""
    prepare(stores())
    flower.command.apply_options("celery", ["flower", "--port=5556"])
    assert options.address == "127.0.0.1"


def test_flower_listens_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(stores())
    flower.command.apply_options("celery", ["flower", "--address=0.0.0.0"])
    assert options.address == "0.0.0.0"
    prepare(stores())
    monkeypatch.setenv("FLOWER_ADDRESS", "10.0.0.1")
    flower.command.apply_env_options()
    assert options.address == "10.0.0.1"


def test_tab_stands_once_behind_those_of_flower() -> None:
    source = (Path(flower.command.settings["template_path"]) / NAVBAR).read_text(encoding="utf-8")
    assert END_OF_TABS in source
    prepare(stores(("dash.example.org", 8080)))
    navbar = flower.command.settings[LOADER].load(NAVBAR)
    page = navbar.generate(
        reverse_url=str, static_url=str, active_tab="workers", current_user=None, handler=MagicMock()
    ).decode()
    assert page.count('href="http://dash.example.org:8080/"') == 1
    assert page.index(">Broker<") < page.index(">Capacity<") < page.index("app-nav-secondary")


@pytest.mark.parametrize(
    ("dashboard", "url"),
    [
        (("0.0.0.0", 8000), "http://127.0.0.1:8000/"),
        (("::", 8000), "http://[::1]:8000/"),
        (("fe80::1", 1), "http://[fe80::1]:1/"),
    ],
)
def test_page_is_at_an_address_that_a_browser_can_open(dashboard: tuple[str, int], url: str) -> None:
    assert page_of(stores(dashboard)) == url


def test_page_of_a_task_has_the_condition_that_is_widened() -> None:
    source = (Path(flower.command.settings["template_path"]) / TASK).read_text(encoding="utf-8")
    assert source.count(REVOCABLE) == 1


def test_tab_escapes_the_address() -> None:
    assert '"http://{{x}}' not in tab('http://{{x}}"><script>')
    assert "<script>" not in tab('http://{{x}}"><script>')
