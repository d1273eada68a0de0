"""The life of a worker: from a duration or a time, until its end."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime, timedelta

import pytest

from celery_capacity.routing.errors import SettingsError
from celery_capacity.workers.membership.lifetime import Lifetime


def test_worker_without_the_setting_has_no_end() -> None:
    assert (Lifetime.of(None).ends_at, Lifetime.of(None).left_ms()) == (math.inf, None)


@pytest.mark.parametrize("setting", [60.0, datetime.now(UTC) + timedelta(hours=1)])
def test_life_ends_after_a_duration_or_at_a_time(setting: float | datetime) -> None:
    seconds = 60.0 if isinstance(setting, float) else (setting - datetime.now(UTC)).total_seconds()
    began = time.monotonic()
    lifetime = Lifetime.of(setting)
    assert began + seconds - 1 < lifetime.ends_at < time.monotonic() + seconds + 1
    left = lifetime.left_ms()
    assert left is not None and 0 < left <= seconds * 1000 + 1000


def test_life_that_is_over_leaves_nothing() -> None:
    assert Lifetime(time.monotonic() - 1).left_ms() == 0


def test_end_in_the_past_is_refused_with_its_value() -> None:
    with pytest.raises(SettingsError, match=r"PLATFORM_LIFETIME=2020-01-01 00:00:00\+00:00 is over"):
        Lifetime.of(datetime(2020, 1, 1, tzinfo=UTC))
