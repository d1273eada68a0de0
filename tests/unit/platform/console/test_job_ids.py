"""Ids of jobs as people type them."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from celery_capacity.platform.console.job_ids import whole_ids
from celery_capacity.routing.errors import InvalidRequest


def test_text_that_is_no_id_is_refused_before_postgres_is_asked() -> None:
    engine = Mock()
    with pytest.raises(InvalidRequest, match="a b"):
        whole_ids(engine, ["e4855c54", "a b"])
    engine.connect.assert_not_called()
