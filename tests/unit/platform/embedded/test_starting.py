"""A start that another thread calls off."""

from __future__ import annotations

import pytest

from celery_capacity.platform.embedded.starting import CalledOff, Start


def test_a_start_that_is_called_off_begins_no_step() -> None:
    beginning = Start()
    beginning.step("Starting Redis.")
    assert beginning.present()[0] == "Starting Redis."
    beginning.call_off()
    for ask in (beginning.check, lambda: beginning.step("Starting Postgres.")):
        with pytest.raises(CalledOff):
            ask()
    assert beginning.present()[0] == "Starting Redis."
