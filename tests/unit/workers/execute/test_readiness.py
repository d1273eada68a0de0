"""The line with the capacity shows at Celery's default level, though it is no warning."""

from __future__ import annotations

import logging

import pytest

from celery_capacity.workers.execute.readiness import _show_at_default_level


@pytest.fixture
def news() -> logging.Logger:
    """Return a new logger below one that stands for Celery's root."""
    root = logging.Logger("root")
    logger = logging.Logger("news")
    logger.parent = root
    return logger


@pytest.mark.parametrize(
    ("level", "shown"),
    [(logging.DEBUG, True), (logging.INFO, True), (logging.WARNING, True), (logging.ERROR, False)],
)
def test_capacity_shows_up_to_the_level_warning(news: logging.Logger, level: int, shown: bool) -> None:
    assert news.parent is not None
    news.parent.setLevel(level)
    _show_at_default_level(news)
    assert news.isEnabledFor(logging.INFO) == shown


def test_level_of_the_configuration_stays(news: logging.Logger) -> None:
    news.setLevel(logging.CRITICAL)
    _show_at_default_level(news)
    assert news.level == logging.CRITICAL
