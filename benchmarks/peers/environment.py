"""The environment of the peers: a virtual environment in build/peers, made once."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

#: Folder of the environment, which git ignores.
FOLDER = Path(__file__).resolve().parents[2] / "build" / "peers"

#: Packages of the peers.
REQUIREMENTS = ("procrastinate==3.10.0", "psycopg[binary]", "distributed==2026.8.0", "hyperqueue==0.27.0")

#: Packages whose versions stand under the table.
SHOWN = ("procrastinate", "distributed", "hyperqueue")


def python() -> str:
    """Return the interpreter of the peers. Install them on the first call, and when the requirements changed."""
    stamp, wanted = FOLDER / "installed", "\n".join(REQUIREMENTS)
    program = FOLDER / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"Installing {', '.join(REQUIREMENTS)} into {FOLDER}", file=sys.stderr, flush=True)
        venv.create(FOLDER, with_pip=True, clear=True)
        install = [str(program), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS]
        subprocess.run(install, check=True)
        stamp.write_text(wanted)
    return str(program)


def versions(interpreter: str) -> dict[str, str]:
    """Return the versions of the installed peers."""
    code = (
        "import importlib.metadata, json\n"
        f"print(json.dumps({{name: importlib.metadata.version(name) for name in {SHOWN!r}}}))"
    )
    done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True)
    installed: dict[str, str] = json.loads(done.stdout)
    return installed
