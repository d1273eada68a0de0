"""Durations as people type them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import click
import pytest

from celery_capacity.platform.console.durations import Duration, Since


@pytest.mark.parametrize(
    ("typed", "seconds"),
    [("90", 90), ("30s", 30), ("15min", 900), ("15m", 900), ("1.5 h", 5400), ("2D", 172800), ("1w", 604800)],
)
def test_duration_is_a_number_and_a_unit(typed: str, seconds: float) -> None:
    assert Duration().convert(typed, None, None) == seconds


@pytest.mark.parametrize("typed", ["", "soon", "0", "-1s", "1 year", "1e3", "٣s", "99999w"])
def test_duration_refuses_any_other_text_with_advice(typed: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is no duration\. Write a number and a unit: 30s"):
        Duration().convert(typed, None, None)


def test_duration_names_its_bounds() -> None:
    with pytest.raises(click.BadParameter, match=r"'1d' is no duration, 0\.2 s to 3600 s"):
        Duration(0.2, 3600).convert("1d", None, None)


def test_time_gives_the_seconds_until_now() -> None:
    before = datetime.now(UTC) - timedelta(hours=1)
    assert Since().convert(before.isoformat(), None, None) == pytest.approx(3600, abs=30)
    local = (before.astimezone().replace(tzinfo=None)).isoformat(timespec="seconds")
    assert Since().convert(local, None, None) == pytest.approx(3600, abs=30)
    assert Since().convert("2h", None, None) == 7200


@pytest.mark.parametrize("text", ["2999-01-01T00:00", "yesterday", "2026-13-01", "0001-01-01", "9999-12-31T23:59"])
def test_time_to_come_and_no_time_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no time"):
        Since().convert(text, None, None)
