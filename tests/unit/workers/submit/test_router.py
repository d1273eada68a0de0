"""The router: which request a call has, from the call, the header of a retry, the file of rules and the task."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, Final

from celery import Celery

from celery_capacity.routing.config.task_rules import NO_RULES, RequestRules, Rule
from celery_capacity.routing.model.message import HEADER
from celery_capacity.routing.model.request import holding
from celery_capacity.workers.dispatch.published_declarations import TIMES
from celery_capacity.workers.submit.router import Router, declaration

GPU: Final = "cpus=1000,gpus=1,slots=1"
WIDE: Final = "cpus=32000,slots=1"
TERM: Final = ",|cpus!1000;gpus!1;slots!1|cpus!32000;slots!1"
app = Celery("alternatives", set_as_current=False)


@app.task(name="tasks.train", requests=[{"gpus": 1}, {"cpus": 32}])
def train() -> None:
    """Declare two alternatives."""


@app.task(name="tasks.plain")
def plain() -> None:
    """Declare nothing."""


def _router(rules: RequestRules = NO_RULES, published: Any = None, *, knows: bool = True) -> Router:
    settings = SimpleNamespace(default_cpus=1000, tenant="default", placement="pack")
    sending = SimpleNamespace(ask=lambda _: published)
    stores: Any = SimpleNamespace(settings=settings, requests=rules, sending=sending)
    return Router(stores, lambda: {"tasks.train": train, "tasks.plain": plain} if knows else {})


def test_task_declares_alternatives_for_each_of_its_jobs() -> None:
    header = _router().header("tasks.train")
    assert (header["shape"], header["declared"]) == (GPU + TERM, True)


def test_call_replaces_alternatives_and_amounts_in_each() -> None:
    router = _router()
    assert router.header("tasks.train", call={"requests": [{"cpus": 2}]})["shape"] == "cpus=2000,slots=1"
    wide = router.header("tasks.train", call={"memory": 2**20})["shape"]
    assert wide.split(",|")[1] == "cpus!1000;gpus!1;memory!1048576;slots!1|cpus!32000;memory!1048576;slots!1"
    placed = router.header("tasks.train", call={"exclusive": True, "where": {"arch": "arm"}})["shape"]
    assert placed == (
        "alone=1,cpus=1000,gpus=1,slots=1,|alone!1;cpus!1000;gpus!1;slots!1|alone!1;cpus!32000;slots!1"
        ",?arch:in:arm,+exclusive"
    )


def test_retry_keeps_all_alternatives_whichever_its_attempt_held() -> None:
    carried = {"shape": holding(GPU + TERM, 2), "declared": True}
    assert _router().header("tasks.train", carried)["shape"] == GPU + TERM
    anew = _router().header("tasks.train", carried, call={"requests": [{"cpus": 2}, {"gpus": 2}]})["shape"]
    assert anew == "cpus=2000,slots=1,|cpus!2000;slots!1|cpus!1000;gpus!2;slots!1"


def test_file_gives_alternatives_to_a_task_that_declares_none() -> None:
    rules = RequestRules((Rule("tasks.plain", {"requests": [{"gpus": 1}, {"cpus": 32}]}),))
    assert _router(rules).header("tasks.plain")["shape"] == GPU + TERM


def test_sender_without_the_task_uses_its_published_alternatives() -> None:
    published = declaration(train, 1000)
    times = published.pop(TIMES)
    replies = [{b"tasks.train": json.dumps(published)}, {b"tasks.train": json.dumps(times)}]
    router = _router(published=replies, knows=False)
    assert router.header("tasks.train")["shape"] == GPU + TERM


def test_option_of_a_call_goes_into_its_headers() -> None:
    options: dict[str, Any] = {"requests": [{"gpus": 1}, {"cpus": 32}]}
    _router()("tasks.plain", (), {}, options, task=plain)
    assert options["headers"][HEADER]["shape"] == GPU + TERM
