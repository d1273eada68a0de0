"""The scripts read a shape as the Python code writes it."""

from __future__ import annotations

from typing import Any, Final

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celery_capacity.routing.ledger import scripts
from celery_capacity.routing.ledger.client import Ledger
from celery_capacity.routing.model.amounts import ALONE
from celery_capacity.routing.model.expected import LONGEST_MS, RunTime
from celery_capacity.routing.model.request import Request, filed_shape, split_shape, timed, with_request

NAMES: Final = st.one_of(st.text(min_size=1, max_size=20), st.text("~^,=0123456789%", min_size=1, max_size=12))
RUN_TIMES: Final = st.builds(
    lambda expected, more: RunTime(expected, expected + more if expected else 0),
    st.integers(0, LONGEST_MS),
    st.integers(0, LONGEST_MS),
)
REQUESTS: Final = st.dictionaries(st.sampled_from(["cpus", "memory", "gpus", "z"]), st.integers(0, 10**6)).map(
    Request.of
)
READ: Final = """
local shape, parts = ARGV[1], {}
for name, amount in pairs(amounts_of(shape)) do parts[#parts + 1] = name .. '=' .. amount end
table.sort(parts)
return {table.concat(parts, ','), task_of(shape) or '', shape_held(shape, 2, 3)}
"""


def _script() -> str:
    functions = scripts._functions()
    used = (functions[name] for name in scripts._used(READ, functions))
    return "".join(used) + READ


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(REQUESTS, NAMES, RUN_TIMES)
def test_scripts_read_the_parts_of_a_shape(ledger: Ledger, request_: Request, name: str, run_time: RunTime) -> None:
    filed = filed_shape(timed(request_.shape, run_time), name)
    answer: Any = ledger.client.eval(_script(), 0, filed)
    alone = with_request(filed, Request.of({**dict(request_.amounts), ALONE: 1}))
    assert [text.decode() for text in answer] == [request_.shape, split_shape(filed).task, alone]
