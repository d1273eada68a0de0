"""The label of waiting jobs."""

from __future__ import annotations

from celery_capacity.platform.web.metrics.exposition import shape_label
from celery_capacity.routing.inspect.waiting import BacklogLine
from celery_capacity.routing.model.request import Request, alternatives_term


def test_label_of_jobs_has_their_request_and_queue() -> None:
    request = Request.of({"cpus": 4000, "queue:night": 1})
    assert shape_label(BacklogLine(request, 1, None)) == "cpus=4 queue=night"


def test_label_of_jobs_with_alternatives_has_each_of_them() -> None:
    requests = [Request.of({"cpus": 1000, "gpus": 1}), Request.of({"cpus": 32_000})]
    line = BacklogLine(requests[0], 1, None, terms=alternatives_term(requests))
    assert shape_label(line) == "cpus=1 gpus=1 or cpus=32 queue=celery"
