"""The load of `make soak` and `make bench-load`: verdicts and the picture."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

import pytest

from benchmarks.costs.reading import family
from benchmarks.steady import load as measured_load
from benchmarks.steady import soak
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
    [({"worker": 1.06}, 1.0, "worker"), ({"Redis": 1.06}, 1.0, "Redis"), ({"tables": 1.6}, 1.0, "tables")],
)
def test_soak_names_the_limit_that_was_not_held(grown: dict[str, float], slower: float, name: str) -> None:
    assert [verdict.name for verdict in soaked(grown, slower).verdicts() if not verdict.held] == [name]


def test_soak_judges_the_latency_by_that_after_the_warm_up() -> None:
    assert [verdict.name for verdict in soaked({}, slower=1.3).verdicts() if not verdict.held] == ["latency p95"]


def test_soak_reports_a_fall_of_memory_and_takes_it_for_no_leak() -> None:
    fallen, flat, latency = soaked({"worker": 0.8, "Redis": 0.97}).verdicts()
    assert (fallen.held, fallen.fell) == (True, True)
    assert (flat.held, flat.fell) == (True, False)
    assert fallen.line().endswith("held, and fell")
    assert fallen.as_json() | {"held": True, "fell": True, "change": 0.8} == fallen.as_json()
    assert latency.line().endswith("held")


def test_soak_takes_no_single_sample_for_growth() -> None:
    run = soaked({"worker": 1.0})
    for number in (2, 3):  # two of the thirteen in the last minute
        run.samples[-number] = Sample(run.samples[-number].second, {"worker": 2_000_000})
    assert [verdict.name for verdict in run.verdicts() if not verdict.held] == []


def test_soak_takes_no_single_pause_for_a_higher_latency() -> None:
    run = soaked({})
    run.latencies += [(1785.0 + number / 100, 900.0) for number in range(100)]
    assert [verdict.name for verdict in run.verdicts() if not verdict.held] == []
    run.latencies += [(1740.0 + number / 10, 900.0) for number in range(600)]
    assert [verdict.name for verdict in run.verdicts() if not verdict.held] == ["latency p95"]


@pytest.mark.parametrize(
    ("seconds", "first", "last"),
    [
        (1800.0, (300, 360), (1740, 1800)),
        (600.0, (100, 160), (540, 600)),
        (240.0, (40, 64), (216, 240)),
        (3600.0, (600, 720), (3480, 3600)),
    ],
)
def test_soak_scales_its_periods(seconds: float, first: tuple[float, float], last: tuple[float, float]) -> None:
    begun, ended = Soaked(seconds).periods()
    assert begun == pytest.approx(first)
    assert ended == pytest.approx(last)


@pytest.mark.parametrize(("arguments", "seconds"), [(["--minutes", "4"], 240), (["--seconds", "30"], 30), ([], 1800)])
def test_soak_runs_as_long_as_it_was_asked(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], seconds: float
) -> None:
    class Running:
        def highest_rate(self) -> float:
            return 100.0

    @contextmanager
    def loaded(*_: object) -> Iterator[Running]:
        yield Running()

    asked: list[tuple[float, float]] = []

    def run(_: object, rate: float, seconds: float, __: object) -> Soaked:
        asked.append((rate, seconds))
        return soaked({"worker": 1.0})

    monkeypatch.setattr(soak, "load", loaded)
    monkeypatch.setattr(soak, "soak", run)
    assert soak.main(arguments) == 0
    assert asked == [(80.0, seconds)]


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
