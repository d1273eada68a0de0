"""Run of Celery's suite, file by file, on servers that are started for it.

The suite imports the installed Celery: only its tests are copied from the checkout. Each file has a process of pytest
of its own, so that a test that hangs or breaks its worker concerns its own file.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from celery_capacity.platform.embedded import servers
from celery_capacity.routing.config.embedded import Pair
from tests.celery_suite import plugin
from tests.celery_suite.comparing import Result

#: Seconds for one file. The longest, of 200 tests of canvas, takes ten minutes.
FILE_WITHIN: Final = 2400.0
#: Folder of the suite in a checkout, and what stands beside it and is not needed.
SUITE: Final = "t/integration"
NOT_NEEDED: Final = ("unit", "smoke", "benchmarks", "__pycache__")
#: Root of this project, from which the plugin is imported.
ROOT: Final = Path(__file__).resolve().parents[2]
CONFIGURATION: Final = "[pytest]\npython_classes = test_*\nxfail_strict = false\naddopts = --strict-markers\n"
#: Module that Python imports at its start: also the programs that a test starts have apps of the platform.
AT_START: Final = "from tests.celery_suite import on_platform\non_platform.connect()\n"
#: Beginnings of variables that a run does not take over.
OURS: Final = ("PLATFORM_", "REDIS_", "DATABASE_", "CELERY_", "TEST_", "NODE_NAME", "PYTEST_")


@dataclass(frozen=True)
class Run:
    """Folder with the suite, and the variables of its processes."""

    folder: Path
    environment: dict[str, str]

    def files(self) -> list[str]:
        """Return the files with tests, in order."""
        return [f"{SUITE}/{path.name}" for path in sorted((self.folder / SUITE).glob("test_*.py"))]

    def results(self, tests: Sequence[str]) -> list[Result]:
        """Run files, or tests by their names, in one process, and return the results. A late process is killed."""
        outcomes = self.folder / "outcomes.jsonl"
        outcomes.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-p", plugin.__name__, "-p", "celery.contrib.pytest"]
        # Celery's suite does without the plugins that this project has.
        command += ["-p", "no:celery", "-p", "no:xdist", "-p", "no:cacheprovider", "-q", "--tb=short", *tests]
        with (self.folder / "pytest.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                process.wait(FILE_WITHIN)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                raise
        if not outcomes.exists():
            return []
        records = [json.loads(line) for line in outcomes.read_text().splitlines()]
        return [Result(record["test"], record["outcome"], record["error"]) for record in records]


@contextmanager
def prepared(checkout: Path, *, on_platform: bool) -> Iterator[Run]:
    """Yield a run with servers of its own, which end with the block."""
    folder = Path(tempfile.mkdtemp(prefix="celery-suite-"))
    try:
        shutil.copytree(checkout / "t", folder / "t", ignore=shutil.ignore_patterns(*NOT_NEEDED))
        (folder / "pytest.ini").write_text(CONFIGURATION)
        if on_platform:
            (folder / "sitecustomize.py").write_text(AT_START)
        with servers.private_pair() as pair:
            yield Run(folder, _environment(folder, pair))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path, pair: Pair) -> dict[str, str]:
    """Return the variables of a run. The ledger and the broker have a database of Redis beside that of the results."""
    address = urlsplit(pair.redis_url)
    base = f"redis://{address.hostname}:{address.port}"
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(OURS)},
        # The suite's own variables, and those of the platform.
        "TEST_BROKER": f"{base}/1",
        "TEST_BACKEND": f"{base}/0",
        "WORKER_LOGLEVEL": "INFO",
        "REDIS_HOST": str(address.hostname),
        "REDIS_PORT": str(address.port),
        "REDIS_URL": f"{base}/1",
        "DATABASE_URL": pair.database_url,
        "PLATFORM_HOME": str(folder / "home"),
        "PYTHONPATH": f"{folder}:{ROOT}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        plugin.OUTCOMES: str(folder / "outcomes.jsonl"),
    }


def run_all(checkout: Path, files: Sequence[str], say: Callable[[str], None], *, on_platform: bool) -> list[Result]:
    """Run these files of the suite, or all of them, and return the results."""
    results = []
    with prepared(checkout, on_platform=on_platform) as run:
        for file in files or run.files():
            of_file = run.results([file])
            results += of_file
            failed = sum(result.outcome == "failed" for result in of_file)
            say(f"{'platform' if on_platform else 'plain   '}  {file}: {len(of_file)} tests, {failed} failed")
    return results
