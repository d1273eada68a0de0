"""Amounts on Flower's own pages: the request and the allocation of a task, the capacity and allocations of a worker.

A task's amounts come with the events `task-waiting` and `task-admitted`, a worker's with its answer to `inspect stats`.
Both come over the broker. So a value that is no amount is shown as it came, and escaped as all of Flower's values are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from celery_capacity.routing.errors import PlatformError
from celery_capacity.routing.model.amounts import CPUS, MEMORY, format_amount, from_people
from celery_capacity.routing.model.request import Request

#: Seconds for which the page of a worker waits for its present amounts. A silent worker's page has the last ones.
PATIENCE: Final = 1.0
#: States in which a task holds its allocation.
HOLDING: Final = frozenset({"ADMITTED", "RECEIVED", "STARTED"})
#: Names of standard resources in a table.
TITLES: Final = {CPUS: "CPUs", MEMORY: "Memory"}
#: Text for an amount that is not there.
NOTHING: Final = "–"

#: Place in the page of a task before the remaining fields of its events, and the rows that come there.
TASK_FIELDS: Final = "      {% for name in task._fields %}"
TASK_ROWS: Final = """\
      {% for title, text in platform_task_rows(task) %}
      <div class="detail-row task-data-row">
        <dt>{{ title }}</dt>
        <dd>{{ text }}</dd>
      </div>
      {% end %}
"""
#: Beginning of the first tab of a worker's page, and the table that comes there.
WORKER_TAB: Final = 'id="tab-pool" role="tabpanel" aria-labelledby="worker-tab-pool" tabindex="0">\n'
WORKER_TABLE: Final = """\
        {% set amounts = platform_worker_rows(worker['stats']) %}
        {% if amounts %}
        <section class="worker-panel mb-3" aria-labelledby="capacity-heading" id="platform-capacity">
          <h2 class="worker-panel-title" id="capacity-heading">Capacity and allocations</h2>
          <table class="table worker-key-value-table mb-0">
            <caption>As of {{ humanize(worker.get('timestamp'), type='time') }}, by the worker's own count</caption>
            <thead><tr>
              <th scope="col">Resource</th><th scope="col">Capacity</th>
              <th scope="col">Allocated</th><th scope="col">Free</th>
            </tr></thead>
            <tbody>
              {% for row in amounts %}
              <tr>{% for cell in row %}<td>{{ cell }}</td>{% end %}</tr>
              {% end %}
            </tbody>
          </table>
        </section>
        {% end %}
"""
#: End of the list of statistics that have a place of their own, and so are not among the others.
PLACED: Final = "clock total rusage'"
ALSO_PLACED: Final = "clock total rusage capacity allocated'"


def task_page(source: str) -> str:
    """Return the template of the page of a task with its request and allocation."""
    return source.replace(TASK_FIELDS, TASK_ROWS + TASK_FIELDS, 1)


def worker_page(source: str) -> str:
    """Return the template of the page of a worker with its capacity and allocations."""
    if WORKER_TAB not in source:
        return source
    return source.replace(WORKER_TAB, WORKER_TAB + WORKER_TABLE, 1).replace(PLACED, ALSO_PLACED, 1)


def task_rows(task: Any) -> list[tuple[str, str]]:
    """Return titles and texts for the page of a task; none where no event of the platform told of it."""
    request = getattr(task, "request", None)
    if request is None:
        return []
    text, held = _request(request), getattr(task, "allocation", None)
    rows = [("Request", text)]
    if task.state in HOLDING and isinstance(held, Mapping):
        rows.append(("Allocation", f"{text} on {held.get('worker')}, attempt {held.get('attempt')}"))
    else:
        rows.append(("Allocation", "none: it waits" if task.state == "WAITING" else "none: released"))
    if queue := getattr(task, "queue", None):
        rows.append(("Queue", str(queue)))
    return rows


def worker_rows(stats: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return resource, capacity, allocations and free amount for the page of a worker; none for another worker.

    Allocations may exceed a capacity that was lowered. Then nothing is free.
    """
    if not isinstance(stats.get("capacity"), Mapping) or not isinstance(stats.get("allocated"), Mapping):
        return []
    try:
        capacity, allocated = from_people(stats["capacity"]), from_people(stats["allocated"])
    except PlatformError:
        return [("all", str(stats["capacity"]), str(stats["allocated"]), NOTHING)]
    rows = []
    for name in dict.fromkeys([*capacity, *allocated]):
        total, held = capacity.get(name, 0), allocated.get(name, 0)
        amounts = [format_amount(name, amount) for amount in (total, held, max(0, total - held))]
        rows.append((TITLES.get(name, name), amounts[0], amounts[1], amounts[2]))
    return rows


def _request(request: Any) -> str:
    if not isinstance(request, Mapping):
        return str(request)
    try:
        return str(Request.from_people(request))
    except PlatformError:
        return str(dict(request))


#: Functions that the templates call.
NAMESPACE: Final = {"platform_task_rows": task_rows, "platform_worker_rows": worker_rows}


def ask_before_showing(view: Any) -> None:
    """Have the page of a worker show the amounts of now. Flower alone shows those of the view before.

    `view`: the class of Flower that answers with the page.
    """
    from tornado.web import authenticated

    flowers_own = view.get
    if flowers_own.__module__ == __name__:
        return

    @authenticated
    async def get(page: Any, name: str) -> None:
        # Flower itself waits for a worker of which it knows nothing yet.
        if name in page.application.workers:
            await asyncio.wait({page.application.update_workers(workername=name)}, timeout=PATIENCE)
        await flowers_own(page, name)

    view.get = get
