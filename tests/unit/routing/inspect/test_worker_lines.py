"""Pages of workers, by name."""

from __future__ import annotations

import gc

import pytest

from celery_capacity.routing.inspect.worker_lines import WHOLE, Page, without_collection


@pytest.mark.parametrize(
    ("page", "shown", "last"),
    [
        (WHOLE, ["a", "b", "c"], None),
        (Page(2), ["a", "b"], "b"),
        (Page(2, "b"), ["c"], None),
        (Page(3), ["a", "b", "c"], None),
        (Page(None, "a"), ["b", "c"], None),
        (Page(1, "aa"), ["b"], "b"),
        (Page(5, "c"), [], None),
    ],
)
def test_page_has_names_in_order_and_says_where_to_go_on(page: Page, shown: list[str], last: str | None) -> None:
    assert page.of(["c", "a", "b"]) == (shown, last)


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_goes_on_as_before(enabled: bool) -> None:
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with without_collection():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()
