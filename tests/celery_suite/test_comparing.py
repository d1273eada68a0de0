"""Comparison of two runs of Celery's suite."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.celery_suite.comparing import Purpose, Result, compare, read_purposes

PURPOSES = [Purpose(("t/a.py::test_x",), "on purpose")]


def outcomes(**by_name: str) -> list[Result]:
    return [Result(f"t/a.py::test_{name}", outcome) for name, outcome in by_name.items()]


def test_failure_differs_unless_it_is_listed_or_plain_celery_fails() -> None:
    platform = outcomes(a="passed", b="failed", c="failed", d="skipped", x="failed")
    plain = outcomes(a="passed", b="failed", c="passed", d="skipped", x="passed")
    table = compare(platform, plain, PURPOSES)["t/a.py"]
    assert (table.passed, table.plain, table.skipped, table.on_purpose) == (1, 1, 1, 1)
    assert [result.test for result in table.differing] == ["t/a.py::test_c"]


def test_each_failure_differs_without_plain_celery() -> None:
    table = compare(outcomes(a="passed", b="failed", x="failed"), None, PURPOSES)["t/a.py"]
    assert [result.test for result in table.differing] == ["t/a.py::test_b"]


def test_test_that_does_not_run_on_the_platform_differs() -> None:
    table = compare(outcomes(b="skipped"), outcomes(a="passed", b="passed"), PURPOSES)["t/a.py"]
    assert [result.outcome for result in table.differing] == ["missing", "skipped"]


def test_listed_test_that_passes_is_told() -> None:
    table = compare(outcomes(x="passed"), outcomes(x="passed"), PURPOSES)["t/a.py"]
    assert (table.passed, table.not_needed) == (1, ["t/a.py::test_x"])


def test_listed_name_covers_its_parameters_and_no_longer_name() -> None:
    (purpose,) = PURPOSES
    assert purpose.covers("t/a.py::test_x[1-a]")
    assert not purpose.covers("t/a.py::test_xy")


def test_table_of_differences_names_each_listed_test() -> None:
    page = Path("docs/reference/differences.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    listed = {test.rpartition("::")[2] for purpose in read_purposes() for test in purpose.tests}
    assert named == listed


def test_difference_without_a_reason_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "on_purpose.toml"
    path.write_text('[[difference]]\nreason = " "\ntests = ["t/a.py::test_x"]\n')
    with pytest.raises(ValueError, match="names its tests and a reason"):
        read_purposes(path)
