"""Lines of the log in JSON: what they name, whatever a task logs, and when they are asked for."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import click
import pytest
from celery.app.log import TaskFormatter
from celery.utils.log import ColorFormatter
from click.testing import CliRunner

from celery_capacity import create_app
from celery_capacity.platform.processes.speaker import Speaker
from celery_capacity.routing.model.message import Tag
from celery_capacity.routing.model.token import Token
from celery_capacity.workers.logs import log_format
from celery_capacity.workers.logs.json_lines import JsonFormatter, message_of, on_after_setup_logger
from celery_capacity.workers.process.attempts import Attempt, held


def line_of(message: str, *args: Any, exc_info: Any = None, **extra: Any) -> dict[str, Any]:
    record = logging.LogRecord("tasks", logging.INFO, __file__, 1, message, args, exc_info)
    record.__dict__.update(extra)
    written = JsonFormatter().format(record)
    assert "\n" not in written
    line: dict[str, Any] = json.loads(written)
    return line


def test_line_in_a_body_names_job_attempt_task_and_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JsonFormatter, "worker", "node-1")
    app = create_app("logs", broker="memory://", backend="cache+memory://")
    seen: list[dict[str, Any]] = []

    @app.task(name="render")
    def render() -> None:
        seen.append(line_of("frame %d", 7))

    with held(Attempt(Tag("job-1", Token(3, 2)), "life")):
        render()
    assert seen[0].pop("time").endswith("+00:00")
    assert seen == [
        {
            "level": "INFO",
            "logger": "tasks",
            "message": "frame 7",
            "worker": "node-1",
            "job": "job-1",
            "attempt": 2,
            "task": "render",
        }
    ]


def test_line_of_celery_about_a_task_names_job_and_task() -> None:
    line = line_of("Task %(name)s[%(id)s] received", data={"id": "job-1", "name": "render"})
    assert (line["job"], line["task"]) == ("job-1", "render")
    assert not {"attempt", "worker", "exception"} & line.keys()


def test_line_holds_any_text_and_the_exception() -> None:
    try:
        raise ValueError("broken \ud800 \n end")
    except ValueError as error:
        line = line_of("\x00 \u2028 \n text", exc_info=(ValueError, error, error.__traceback__))
    assert line["message"] == "\x00 \u2028 \n text"
    assert line["exception"].startswith("Traceback")


def test_line_shows_no_secret() -> None:
    line = line_of("first\npassword=hunter2\nredis://:hunter2@store/0")
    assert line["message"].split("\n") == ["first", "***", "redis://:***@store/0"]


@pytest.mark.parametrize(("value", "is_json"), [("JSON", True), ("text", False), ("", False)])
def test_celerys_handlers_alone_get_the_formatter(value: str, is_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLATFORM_LOG_FORMAT", value)
    logger = logging.Logger("set up by Celery")
    for formatter in (ColorFormatter(), TaskFormatter(), logging.Formatter("%(message)s")):
        handler = logging.StreamHandler()
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    on_after_setup_logger(logger=logger)
    kinds = [isinstance(handler.formatter, JsonFormatter) for handler in logger.handlers]
    assert kinds == [is_json, is_json, False]


@pytest.mark.parametrize("command", ["worker", "beat"])
def test_celerys_commands_have_the_option(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLATFORM_LOG_FORMAT", "text")
    app = create_app("logs", broker="memory://", backend="cache+memory://")
    called = click.Command(command, params=[*app.user_options[command]], callback=lambda: None)
    assert CliRunner().invoke(called, ["--log-format", "json"]).exit_code == 0
    assert log_format.is_asked_for()
    refused = CliRunner().invoke(called, ["--log-format", "xml"])
    assert (refused.exit_code, "'xml'" in refused.output) == (2, True)


def test_up_says_each_line_as_an_object() -> None:
    stream = io.StringIO()
    speaker = Speaker(stream, as_json=True)
    child: Any = type("Child", (), {"name": "worker-01"})
    speaker.say("Ending.")
    speaker.say_of(child, '{"message": "ready", "worker": "worker-01"}')
    speaker.say_of(child, "celery beat is starting")
    speaker.say_of(child, "")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == ["Ending.", "ready", "celery beat is starting"]
    assert (lines[1]["worker"], lines[2]["process"]) == ("worker-01", "worker-01")


def test_message_of_a_line_is_none_for_other_text() -> None:
    assert message_of('{"message": "worker-01 ready."}') == "worker-01 ready."
    assert [message_of(line) for line in ("worker-01 ready.", "{", '{"message": 1}', "{}")] == [None] * 4
