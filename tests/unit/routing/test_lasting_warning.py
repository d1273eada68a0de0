"""A trouble that lasts is logged when it begins or changes."""

from __future__ import annotations

import logging

import pytest

from celery_capacity.routing.lasting_warning import LastingWarning


def test_lasting_warning_is_logged_once_until_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    warning = LastingWarning(logging.getLogger(__name__))
    assert not warning.over()
    for message in ("Redis is away", "Redis is away", "Redis is full"):
        warning.warn(message)
    assert warning.over()
    warning.warn("Redis is full", trace=ValueError("a defect"))
    assert [record.message for record in caplog.records] == ["Redis is away", "Redis is full", "Redis is full"]
    assert [record.exc_info is not None for record in caplog.records] == [False, False, True]
