"""Check what the reference and the explanations say against the code.

The subjects are keys and fields of a ledger in use, tables as the migrations make them, counters, the public API, the
policy's words and numbers, and figures that were measured.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from flower.events import PrometheusMetrics
from sqlalchemy import Engine, text

import celery_capacity
from benchmarks.figures import FIGURES
from benchmarks.proposals.report import RESULTS, Report
from benchmarks.report import read_results, sizing
from celery_capacity.platform.console import render
from celery_capacity.routing.inspect import overview
from celery_capacity.routing.inspect.explanation import Explanation
from celery_capacity.routing.ledger import keys, snapshot
from celery_capacity.routing.ledger.replies import Adopted, Ended
from celery_capacity.routing.model import states
from celery_capacity.routing.model.amounts import LABEL, labels
from celery_capacity.routing.model.capacity import Capacity
from celery_capacity.routing.model.reasons import Refusal
from celery_capacity.routing.model.request import Request
from celery_capacity.routing.model.states import Outcome
from celery_capacity.routing.model.token import Token
from celery_capacity.routing.policy import placement
from celery_capacity.routing.policy.feasibility import judge
from celery_capacity.routing.policy.placement import Admission, Book, order
from celery_capacity.routing.policy.placement import Refusal as Refused
from celery_capacity.routing.policy.reservation import Reservation
from celery_capacity.workers.runner.duty_runner import Pass
from celery_capacity.workers.supervision import metric_names
from docs.site import reference
from tests.fixtures.processes.platforms import ROOT
from tests.fixtures.stores.books import MESSAGE, MOST_LOSSES, job_field, open_ledger
from tests.fixtures.stores.cluster import ONE, Cluster

DOCS: Final = ROOT / "docs"
KEYS: Final = DOCS / "reference" / "keys.md"
TABLES: Final = DOCS / "reference" / "tables.md"
METRICS: Final = DOCS / "reference" / "metrics.md"
API: Final = DOCS / "reference" / "api.md"
ERRORS: Final = DOCS / "reference" / "errors.md"
POLICY: Final = DOCS / "explanation" / "policy.md"
COMPARISON: Final = DOCS / "explanation" / "comparison.md"
PROPOSALS: Final = DOCS / "RESOURCE_OPTIMIZATION_PROPOSALS.md"


def sections(page: Path) -> dict[str, str]:
    """Return the text under each heading of a page, by the heading without its marks.

    Code blocks are left out.
    """
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {name.replace("`", ""): body for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def rows(body: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the tables in a section, without their headers."""
    lines = body.splitlines()
    for number, line in enumerate(lines):
        rule = [other.startswith("| ---") for other in lines[number : number + 2]]
        if line.startswith("|") and not any(rule):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def names(cell: str) -> list[str]:
    """Return the words that stand in code in a cell."""
    return re.findall(r"`([^`]+)`", cell)


# -- keys


def documented_keys() -> dict[str, tuple[str, str]]:
    """Return the pattern of each key -> (type, lifetime)."""
    return {names(cells[0])[0]: (cells[1], cells[3]) for cells in rows(sections(KEYS)["Keys in Redis"])}


def test_the_page_of_keys_has_the_families_and_types_of_the_code() -> None:
    kinds = dict(re.findall(r"^\| `([^`]+)` \| ([a-z ]+?)(?: with expiry)? \|", keys.__doc__ or "", re.MULTILINE))
    assert {name: kind for name, (kind, _) in documented_keys().items()} == kinds
    assert {name.partition("<")[0] for name in kinds} == set(keys.KEYS.values())


@pytest.fixture
def used(redis_url: str) -> Iterator[Cluster]:
    """Yield a ledger in which every kind of key stands, and jobs in every state."""
    with open_ledger(redis_url) as ledger:
        cluster = Cluster(ledger)
        cluster.register()
        for job in ("ended", "unnamed", "back", "succeeded"):
            cluster.run(job)
        failed = Ended("ended", Token(1, 1), Outcome.FAILED, "its error", "{}", told=True)
        ledger.settle("w", "w-life", ended=[failed], most_losses=MOST_LOSSES)
        ledger.note_successor("succeeded", b"its successor")
        ledger.note_reconcile(drift=1)
        assert ledger.revoke("succeeded")
        cluster.submit("admitted")
        ledger.client.zadd(keys.UNCLAIMED, {"admitted": 0})
        ledger.redeliver()
        ledger.submit("once", ONE, order(0, 99), MESSAGE, rerun=False)
        cluster.submit("wide", Request.of({"cpus": 99_000}).shape)
        cluster.end("back", Token(1, 1), "handed_back", admit=False)
        cluster.renew("succeeded")
        # A job that has lost two attempts runs alone. The worker, on which others run, is kept for it.
        cluster.submit("last", losses=2)
        ledger.fill("w")
        for worker in ("small", "smaller"):
            cluster.register(worker, Request.of({"cpus": 1}).shape)
        ledger.register(
            "knowing", "life", "queue.knowing", Request.of({"cpus": 1}).shape, {"pid": "1"}, tasks=["tasks.render"]
        )
        cluster.register("labelled", Capacity.of({"cpus": 1, "slots": 1, **labels(["video"])}).shape)
        ledger.register(
            "idle",
            "life",
            "queue.idle",
            Request.of({"cpus": 1}).shape,
            {"pid": "2"},
            left_ms=1,
            labels={"arch": "arm"},
            admit=False,
        )
        ledger.adopt("small", "small-life", [Adopted("adopted", Token(1, 1), ONE, 1, 5, 6, "", 0)])
        paused = Request.of({"cpus": 5000}).within("paused").shape
        ledger.set_controls(1, {("cordon", "idle"): "draining", ("pause", "queue:paused"): "1"}, last=True)
        assert ledger.submit("paused", paused, order(0, 98), MESSAGE).state == "waiting"
        wide, first = Request.of({"cpus": 99_000}).shape, int(job_field(ledger.client, "wide", "order") or 0)
        assert ledger.reserve(Reservation("smaller", wide, first, 0, {"slots": 1}, 1), {}, ["smaller"])
        ledger.client.hset(keys.DECLARATIONS, "task", "{}")
        ledger.client.hset(keys.DECLARED_TIMES, "task", "{}")
        ledger.elect("w-life", 0, 60.0)
        ledger.elect("v-life", 0, 60.0, ["suspicion"])
        ledger.probe()
        ledger.client.hset(keys.EPOCH, mapping={"rebuilding": "1", "opening": "2", "database": "id", "carries": "1"})
        ledger.client.sadd(keys.CARRIED, "older")
        ledger.client.hset(keys.EPOCH, mapping={"stay": "1", "tight": "1"})
        ledger.client.zadd(keys.BORDER, {ONE: order(0, 9999)})
        ledger.client.zadd(keys.KEYS["left"], {ONE: order(0, 9999)})
        ledger.client.sadd(keys.LOW, ONE)
        ledger.client.hset(keys.STAYING, ONE, "1")
        ledger.set_controls(2, {("tenant", "physics"): "2;;"}, last=True)
        ledger.age_shares({"cpus": 4000})
        ledger.client.hset(keys.PAST, "physics", "0.25")
        ledger.client.hset(keys.USED, "physics/cpus", 0)
        ledger.client.zadd(keys.TENANT_HEADS, {"physics": order(0, 9999)})
        yield cluster


def pattern_of(field: str) -> str:
    """Return the form in which the page writes a field of a hash."""
    if field.startswith(f"c.{LABEL}"):
        return field if field == f"c.{LABEL}" else f"c.{LABEL}<queue>"
    return re.sub(r"^([ac])\..+", r"\1.<resource>", field)


def test_every_key_and_field_of_a_ledger_in_use_is_on_the_page(used: Cluster) -> None:
    client: Any = used.client
    documented = documented_keys()
    fields = {
        name: {field for cells in rows(body) for field in names(cells[0])}
        for name, body in sections(KEYS).items()
        if name in documented
    }
    met: dict[str, set[str]] = {}
    for key in (raw.decode() for raw in client.scan_iter()):
        if key.startswith("queue."):
            continue  # the private queues of this test's workers
        pattern = max((name for name in documented if key.startswith(name.partition("<")[0])), key=len)
        kind, lifetime = documented[pattern]
        assert client.type(key).decode() == {"sorted set": "zset"}.get(kind, kind), key
        # Postgres has no end of any job yet here.
        ended = pattern == "ledger:job:<id>" and client.getrange(key, 0, 6) == b"ended\n\n"
        expires = ended or pattern in ("ledger:probe", "worker:<name>", "ledger:tasks:<catalogue>")
        assert (client.pttl(key) > 0) == expires, f"{key}, whose lifetime is: {lifetime}"
        seen = met.setdefault(pattern, set())
        if pattern == "ledger:stream":
            seen |= {field.decode() for _, entry in client.xrange(key) for field in entry}
        elif pattern == "ledger:job:<id>":
            value = client.get(key)
            seen |= snapshot.parse_job(value).keys() | ({"message"} if value.endswith(b"}") else set())
        elif pattern in fields:
            seen |= {pattern_of(field.decode()) for field in client.hkeys(key)}
    assert set(met) == set(documented), "a family of which this ledger has no key"
    missing = {name: seen_fields - fields[name] for name, seen_fields in met.items() if name in fields}
    assert {name: seen_fields for name, seen_fields in missing.items() if seen_fields} == {}
    # The fields that a worker writes of itself in its view are compared where a worker runs.
    for name in set(fields) - {"worker:<name>"}:
        assert fields[name] == {field for field in fields[name] if field in met[name]}, name


def test_the_view_of_the_page_is_what_a_worker_writes() -> None:
    source = (ROOT / "workers" / "membership" / "registration.py").read_text(encoding="utf-8")
    view = ast.parse(source[source.index("    def _view") :].replace("\n    ", "\n").strip())
    written = {
        key.value
        for node in ast.walk(view)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    documented = {field for cells in rows(sections(KEYS)["worker:<name>"]) for field in names(cells[0])}
    assert documented == written


# -- tables


def test_the_page_of_tables_is_what_the_migrations_make(engine: Engine) -> None:
    columns = text(
        "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'public'"
        " AND table_name NOT IN (SELECT relname FROM pg_class WHERE relispartition)"
    )
    short = {"timestamp with time zone": "timestamptz", "character varying": "varchar"}
    made: dict[str, dict[str, str]] = {}
    with engine.connect() as connection:
        for table, column, kind in connection.execute(columns):
            made.setdefault(table, {})[column] = short.get(kind, kind)
    documented = {
        name: {names(cells[0])[0]: cells[1] for cells in rows(body)}
        for name, body in sections(TABLES).items()
        if name in made
    }
    assert documented == made


def test_the_steps_of_the_page_are_those_of_the_code() -> None:
    documented = {names(cells[1])[0]: int(cells[0]) for cells in rows(sections(TABLES)["Steps"])}
    assert documented == {step.name: step.value for step in states.Step}


# -- metrics


def test_every_counter_is_on_the_page_of_metrics() -> None:
    # A cancel counts under the state that it makes. Reconcile counts in Python, and so does a refused attempt.
    counted = {"cancelled", "expired", "failed", "drift"} | {f"duty.DUTY.{result}" for result in Pass}
    refused: set[str] = set()
    for path in [*(ROOT / "routing").rglob("*.py"), *(ROOT / "workers").rglob("*.py")]:
        code = path.read_text(encoding="utf-8")
        counted |= set(re.findall(r"\btally\.add\(\"([\w.]+)\"", code))
        refused |= {Refusal[name].value for name in re.findall(r"\bRefusal\.([A-Z_]+)\b", code)}
    for path in (ROOT / "routing" / "lua").rglob("*.lua"):
        counted |= set(re.findall(r"\bcount\('([\w.]+)'", path.read_text(encoding="utf-8")))
    refused |= {name for name in counted if name.startswith(("stale.", "refused."))}
    assert refused == set(Refusal), "each reason counts something, and nothing else is refused"
    counted |= refused
    documented = [names(cells[0])[0] for cells in rows(sections(METRICS)["Counters"])]
    assert sorted(documented) == sorted(counted)


def test_the_other_numbers_are_in_the_json(used: Cluster) -> None:
    numbers = overview.from_ledger(used.client).to_json()
    for cells in rows(sections(METRICS)["Other numbers of the same JSON"]):
        for path in names(cells[0]):
            value: Any = numbers
            for part in path.split("."):
                value = value[part.removesuffix("[]")]
                value = value[0] if part.endswith("[]") else value


def test_metrics_of_prometheus_are_on_the_page() -> None:
    documented = {
        names(cells[0])[0]: (cells[1], tuple(names(cells[2])), cells[3], cells[4])
        for cells in rows(sections(METRICS)["Prometheus"])
    }
    assert documented == {
        m.name: (m.kind.value, m.labels, m.meaning, "both" if len(m.served_by) > 1 else m.served_by[0].value)
        for m in metric_names.METRICS
    }


def test_the_metrics_of_flower_are_those_that_it_has() -> None:
    has = set(re.findall(r"'(flower_\w+)'", inspect.getsource(PrometheusMetrics)))
    assert {names(cells[0])[0] for cells in rows(sections(METRICS)["Flower"])} == has


# -- the API


@pytest.mark.parametrize("page", reference.PAGES)
def test_generated_blocks_are_as_the_code_has_them(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert text == reference.filled(text, reference.PAGES[page]()), "`make reference` makes them anew"


def test_every_public_name_has_a_heading_or_is_among_the_errors() -> None:
    headings = re.findall(r"^### `(\w+)`$", API.read_text(encoding="utf-8"), re.MULTILINE)
    usual = {name for name in celery_capacity.__all__ if reference.has_usual_arguments(name)}
    assert sorted(headings) == sorted({*celery_capacity.__all__} - usual)
    errors = {names(cells[0])[0] for cells in rows(sections(ERRORS)["Errors"])}
    assert usual < errors < {*celery_capacity.__all__}


@pytest.mark.parametrize(
    ("page", "wrong"),
    [
        ("<!-- one:begin -->\n<!-- one:end -->\n", "two"),
        ("<!-- one:begin -->\n<!-- one:end -->\n<!-- two:begin -->\n<!-- two:end -->\n<!-- six:begin -->\n", "six"),
        ("<!-- one:begin -->\n<!-- one:end -->\n<!-- two:begin -->\n", "the block two has no end"),
        ("<!-- one:begin -->\n<!-- one:begin -->\n<!-- two:begin -->\n", "one"),
    ],
)
def test_a_page_without_a_place_for_a_block_is_refused(page: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        reference.filled(page, {"one": "1", "two": "2"})


def test_a_block_replaces_what_stood_in_its_place() -> None:
    page = "before\n<!-- one:begin -->\nold\n<!-- one:end -->\nbehind\n"
    assert reference.filled(page, {"one": r"\1 new"}) == page.replace("old", r"\1 new")


# -- explanations


def test_the_numbers_of_the_policy_are_its_constants() -> None:
    page = " ".join(POLICY.read_text(encoding="utf-8").split())
    assert f"**{placement.CANDIDATES} candidates**" in page
    assert f"**{placement.SHAPES} shapes**" in page
    assert f"**{placement.MAX_ADMITTED} jobs**" in page


def test_the_example_of_the_policy_is_what_it_decides() -> None:
    books = [Book("a", {"cpus": 8000, "slots": 8}, {"cpus": 5000, "slots": 1})]
    books.append(Book("b", {"cpus": 16_000, "slots": 16}, {"cpus": 10_000, "slots": 1}))
    for cpus, worker in ((2000, "a"), (4000, "b")):
        assert placement.choose(Request.of({"cpus": cpus}), books, placement.CANDIDATES) == Admission(worker)
    wide = Request.of({"cpus": 12_000})
    refusal = judge(wide, books)
    assert isinstance(refusal, Refused)
    why = Explanation(
        "job",
        states.State.WAITING,
        refusal.reason,
        wide,
        True,
        resource=refusal.resource,
        asked=refusal.asked,
        free=refusal.free,
        worker=refusal.worker,
    )
    sentence = re.search(r"^> (.+)$", POLICY.read_text(encoding="utf-8"), re.MULTILINE)
    assert sentence is not None
    assert sentence[1] in render.reasons(why)


SYSTEMS: Final = ("Slurm", "HyperQueue", "Ray", "Dask", "Kueue", "Airflow pools", "Plain Celery")


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_comparison_says_what_the_other_does_better_and_cites_it(system: str) -> None:
    body = sections(COMPARISON)[system]
    assert "does better:" in body
    assert "better here" in body
    assert re.search(r"^Take ", body, re.MULTILINE), "when to take it instead"
    assert re.search(r"\]\(https://\S+\)", body), "without a source"


MERMAID: Final = [
    (path, diagram)
    for path in sorted(DOCS.rglob("*.md"))
    for diagram in re.findall(r"^```mermaid\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize(("path", "diagram"), MERMAID, ids=lambda value: value.name if isinstance(value, Path) else "")
def test_a_drawing_names_only_its_participants_and_closes_its_blocks(path: Path, diagram: str) -> None:
    assert ";" not in diagram, "Mermaid takes it for the end of a line"
    if not diagram.startswith("sequenceDiagram"):
        return
    participants = set(re.findall(r"participant (\w+) as", diagram))
    arrows = re.findall(r"^ *(\w+)-?->>(\w+): \S", diagram, re.MULTILINE)
    assert {name for arrow in arrows for name in arrow} == participants
    opened = re.findall(r"^ *(alt|loop|opt|par)\b", diagram, re.MULTILINE)
    assert len(opened) == len(re.findall(r"^ *end$", diagram, re.MULTILINE))


def test_the_figures_of_the_proposals_are_those_that_were_measured() -> None:
    page = PROPOSALS.read_text(encoding="utf-8")
    figures = dict(re.findall(r"<!-- proposals-(\w+):begin -->\n(.*?)\n<!-- proposals-\1:end -->", page, re.DOTALL))
    assert figures == Report.from_json(RESULTS.read_text(encoding="utf-8")).tables()


def test_the_figures_of_sizing_are_those_that_were_measured() -> None:
    page = (DOCS / "how-to" / "sizing.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- sizing:begin -->\n(.*?)\n<!-- sizing:end -->", page, re.DOTALL)
    assert table is not None
    assert table[1] == sizing(read_results(ROOT / "benchmarks" / "results.json"))


def test_reference_explains_every_figure_of_the_benchmarks() -> None:
    page = (DOCS / "reference" / "benchmarks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`(\S+)`", row)}
    families = ("cpu_per_job_", *(name.removesuffix("…") for name in explained if name.endswith("…")))
    names = {figure.name for figure in FIGURES if not figure.name.startswith(families)}
    assert names - explained == set()


def test_results_of_the_benchmarks_are_of_their_figures() -> None:
    assert set(read_results(ROOT / "benchmarks" / "results.json")) <= {figure.name for figure in FIGURES}
