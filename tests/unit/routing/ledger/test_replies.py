"""The verdicts of the scripts are the words that the scripts say."""

from __future__ import annotations

import re
from enum import StrEnum

import pytest

from celery_capacity.routing.ledger import scripts
from celery_capacity.routing.ledger.replies import (
    AdoptVerdict,
    CancelVerdict,
    ClaimVerdict,
    LapseVerdict,
    ReleaseVerdict,
    SubmitVerdict,
)

#: Replies of a script that does not act: `LedgerServer` raises for these.
REFUSALS = {"cold", "epoch"}


@pytest.mark.parametrize(
    ("script", "verdicts"), [("submit", SubmitVerdict), ("cancel", CancelVerdict), ("lapse", LapseVerdict)]
)
def test_verdicts_are_the_heads_of_the_replies(script: str, verdicts: type[StrEnum]) -> None:
    assert set(scripts.signature(script).replies) - REFUSALS == set(verdicts)
    words = set(re.findall(r"'(\w+)'", scripts.load(1, 1, 0, flags=True)[script].text))
    assert set(verdicts) <= words


@pytest.mark.parametrize(
    ("script", "verdicts"), [("release", ReleaseVerdict), ("claim", ClaimVerdict), ("adopt", AdoptVerdict)]
)
def test_verdicts_are_those_that_the_script_has_for_a_job(script: str, verdicts: type[StrEnum]) -> None:
    remarks = re.compile(r"\s*\([^()]*\)")
    (listed,) = re.findall(r"then for each job: ([\w| ]+)", remarks.sub("", scripts.header(script)["Replies"]))[:1]
    assert set(listed.split(" | ")) == set(verdicts)
    body = scripts.source(script)
    assert set(re.findall(r"\bverdict(?:, \w+)* = '(\w+)'", body)) == set(verdicts)
