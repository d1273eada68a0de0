"""`job`: the result of a job that succeeded, and its texts for a program."""

from __future__ import annotations

import pytest

from celery_capacity.platform.console import job_document
from celery_capacity.workers.app.install import create_app


def test_result_is_not_available_at_once_where_its_backend_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("DATABASE_URL", "postgresql://me@127.0.0.1:1/platform")
    app = create_app("looking", backend="redis://127.0.0.1:1/0", result_backend_max_retries=3)
    text = job_document._result(app, "e4855c54")
    assert text is not None
    assert text.startswith("not available: ")
    assert app.backend.always_retry is False
    app.close()


def test_texts_for_a_program_are_whole_and_hide_secrets() -> None:
    long = "a  b\n" * 200
    texts = job_document._hidden({"args": long, "kwargs": "{'password': 'hunter2'}", "result": None})
    assert texts["args"] == long
    assert "hunter2" not in str(texts["kwargs"])
    assert texts["result"] is None
