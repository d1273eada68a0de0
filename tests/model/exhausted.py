"""Bounds that were searched without a violation, by a digest of the model's sources.

A search reads nothing but these sources, so the next one would visit the same states. `python -m tests.model --store`
searches the usual bounds, and keeps how many states and steps each has beside the digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tests.model.search import Found
from tests.model.state import Bounds

FOLDER: Final = Path(__file__).parent
#: The digest, and the number of states and steps by the name of the bounds.
STORED: Final = FOLDER / "exhausted.json"
#: Sources on which no search depends.
BESIDE: Final = ("__init__.py", "__main__.py", "exhausted.py", "test_model.py")
#: Bounds of at most so many states are searched anew all the same. The search takes about a second.
FEW_STATES: Final = 30_000


def digest() -> str:
    """Return the digest of all sources that a search reads."""
    made = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.py")):
        if path.name not in BESIDE:
            made.update(f"{path.name}\n".encode() + path.read_bytes())
    return made.hexdigest()


def stored(bounds: Bounds) -> tuple[int, int] | None:
    """Return the number of states and steps within these bounds; None if the model has changed since their search."""
    kept = json.loads(STORED.read_text(encoding="utf-8"))
    sizes = kept["searches"].get(bounds.name) if kept["model"] == digest() else None
    return None if sizes is None else (sizes["states"], sizes["steps"])


def store(results: Iterable[Found]) -> None:
    searches = {run.bounds.name: {"states": run.states, "steps": run.steps} for run in results}
    STORED.write_text(json.dumps({"model": digest(), "searches": searches}, indent=2) + "\n", encoding="utf-8")
