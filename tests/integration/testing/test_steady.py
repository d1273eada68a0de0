"""The load of `make soak` and `make bench-load`: verdicts and the picture."""

from __future__ import annotations

import json
import os
from xml.etree import ElementTree

import pytest

from benchmarks.costs.reading import family
from benchmarks.steady import load as measured_load
from benchmarks.steady.curve import PICTURE, RESULTS, SHARES
from benchmarks.steady.drawing import svg
from benchmarks.steady.load import load
from benchmarks.steady.soak import Sample, Soaked, memory


def soaked(grown: dict[str, float], slower: float = 1.0) -> Soaked:
    """Return a run of 1,800 s in which sizes and latencies were multiplied half-way."""
    run = Soaked(1800.0)
    for second in range(0, 1800, 5):
        late = second > 900
        sizes = {name: round(1e6 * (times if late else 1)) for name, times in grown.items()}
        run.samples.append(Sample(float(second), sizes))
        run.latencies.append((float(second), 10 * (slower if late else 1)))
    return run


def test_soak_holds_its_limits_while_nothing_grows() -> None:
    verdicts = soaked({"worker": 1.04, "tables": 1.4}, slower=1.1).verdicts()
    assert [(verdict.name, verdict.held) for verdict in verdicts] == [
        ("worker", True),
        ("tables", True),
        ("latency p95", True),
    ]


@pytest.mark.parametrize(
    ("grown", "slower", "name"),
    [({"worker": 1.06}, 1.0, "worker"), ({"worker": 0.9}, 1.0, "worker"), ({"tables": 1.6}, 1.0, "tables")],
)
def test_soak_names_the_limit_that_was_not_held(grown: dict[str, float], slower: float, name: str) -> None:
    assert [verdict.name for verdict in soaked(grown, slower).verdicts() if not verdict.held] == [name]


def test_soak_judges_the_latency_by_that_after_the_warm_up() -> None:
    assert [verdict.name for verdict in soaked({}, slower=1.3).verdicts() if not verdict.held] == ["latency p95"]


def test_memory_of_a_process_counts_its_children() -> None:
    assert family(os.getpid())[0] == os.getpid()
    assert memory(os.getpid()) > 10e6


def test_load_gives_the_latency_of_every_job() -> None:
    taken: list[float] = []
    with load("plain") as running:
        running.run(50, 1, lambda notes: taken.extend(note.milliseconds for note in notes))
    assert len(taken) == 50
    assert min(taken) > 0


def test_highest_rate_leaves_no_queue_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_load, "UNDER_WAY", 5)
    monkeypatch.setattr(measured_load, "SATURATED_SECONDS", 0.5)
    monkeypatch.setattr(measured_load, "WARM_UP_SECONDS", 0.1)
    with load("plain") as running:
        assert running.highest_rate() > 0
        notes = running._saturate(0.5)
    assert notes
    for note in notes:
        assert sum(other.due <= note.due < other.ended for other in notes) <= 5


def test_picture_of_the_latency_shows_the_stored_points() -> None:
    curve = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert [point["share"] for point in curve["ours"]] == list(SHARES)
    assert PICTURE.read_text(encoding="utf-8") == svg(curve)
    titles = [
        title.text or "" for title in ElementTree.fromstring(svg(curve)).iter("{http://www.w3.org/2000/svg}title")
    ]
    assert sum("ms" in title for title in titles) == 2 * 2 * len(SHARES)
