"""Pictures of the terminal for the documents: `make pictures` runs real commands and draws their screens as SVG.

A platform of its own runs for a minute, in a folder that is removed at the end. Each picture has the lines that were
typed and what the commands wrote to a terminal. The files are in the repository, and name no address and no font file,
so that they show without a network.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from celery_capacity.routing.config.secret_files import SUFFIX

PICTURES: Final = Path(__file__).resolve().parents[1] / "pictures"
#: Columns of the drawn terminal.
COLUMNS: Final = 104
#: Seconds until a platform is ready, and until its screen shows what was submitted.
PATIENCE: Final = 90.0
#: Variables of the caller that would change what is drawn.
FOREIGN: Final = ("PLATFORM_", "CELERY_", "NODE_NAME", "REDIS_URL", "DATABASE_URL", "NO_COLOR", "FORCE_COLOR", "LINES")
#: Workers that have more CPUs than most machines: their jobs only wait.
WORKERS: Final = ("--worker", "render-01=32", "--worker", "render-02=16", "--worker", "small-01=8")

TASKS: Final = """\
import time
from pathlib import Path

from celery import shared_task


@shared_task(cpus=12, memory="2GiB")
def render(scene):
    while not Path("done").exists():
        time.sleep(0.1)


@shared_task(cpus=2)
def preview(scene):
    while not Path("done").exists():
        time.sleep(0.1)
"""
SUBMIT: Final = """\
from celery_capacity import create_app

app = create_app(include=["tasks"])

from tasks import preview, render

for number in range(5):
    preview.apply_async(["lion"], task_id=f"preview-{number}")
for scene in ("lion", "tiger", "heron", "whale", "otter"):
    render.apply_async([scene], task_id=scene)
"""

#: Waiting jobs and allocated CPUs when all that fits of this runs.
WAITING: Final = 2
ALLOCATED: Final = 46

#: Each picture, and its lines to type.
SCREENS: Final[Mapping[str, Sequence[str]]] = {
    "cluster": ("celery -A platform cluster", "celery -A platform job otter"),
}

#: Background, text, and the eight colours of a terminal, dark and bright.
DARK: Final = "484f58 ff7b72 3fb950 d29922 58a6ff bc8cff 39c5cf b1bac4"
BRIGHT: Final = "6e7681 ffa198 56d364 e3b341 79c0ff d2a8ff 56d4dd ffffff"


def colours(text: str) -> list[tuple[int, int, int]]:
    """Return the red, green and blue of each colour in a line."""
    return [(number >> 16, number >> 8 & 255, number & 255) for number in (int(word, 16) for word in text.split())]


THEME: Final = TerminalTheme((13, 17, 23), (201, 209, 217), colours(DARK), colours(BRIGHT))
#: A frame without the fonts that rich's own asks a server for.
FRAME: Final = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def screen(command: str, folder: Path, environment: Mapping[str, str]) -> str:
    """Return what a command writes to a terminal, colours included."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(shlex.split(command), cwd=folder, env=environment, stdout=end, stderr=end, stdin=end)
    os.close(end)
    written = bytearray()
    try:
        while chunk := os.read(terminal, 65536):
            written += chunk
    except OSError:  # Linux says so when the last process closes a terminal
        os.close(terminal)
    if process.wait(PATIENCE) != 0:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{written.decode()}")
    return written.decode().replace("\r\n", "\n")


def draw(name: str, typed: Sequence[tuple[str, str]]) -> str:
    """Return the SVG of a terminal in which each command was typed and wrote its output."""
    console = Console(width=COLUMNS, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for number, (command, output) in enumerate(typed):
        console.print(Text.assemble("\n" if number else "", ("$ ", "bold green"), (command, "bold")))
        console.print(Text.from_ansi(output.rstrip()))
    console.print()  # the frame would cut the descenders of the last line
    svg = console.export_svg(title="celery-capacity", theme=THEME, code_format=FRAME, unique_id=f"terminal-{name}")
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


@contextmanager
def platform(folder: Path) -> Iterator[dict[str, str]]:
    """Run a platform with jobs in `folder`; yield the environment in which commands see it."""
    kept = {name: value for name, value in os.environ.items() if not name.removesuffix(SUFFIX).startswith(FOREIGN)}
    environment = {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
        "PLATFORM_HOME": str(folder / "servers"),
        "PLATFORM_DASHBOARD": "127.0.0.1:0",
        "COLUMNS": str(COLUMNS),
        "TERM": "xterm-256color",
        "PYTHONUTF8": "1",
    }
    (folder / "tasks.py").write_text(TASKS, encoding="utf-8")
    (folder / "submit.py").write_text(SUBMIT, encoding="utf-8")
    up = subprocess.Popen(
        ["celery", "-A", "platform", "up", *WORKERS],
        cwd=folder,
        env={**environment, "PLATFORM_IMPORTS": "tasks"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log: list[str] = []
    try:
        for line in up.stdout or ():
            log.append(line)
            if "Ctrl-C" in line:
                break
        else:
            raise RuntimeError(f"up ended with {up.wait()}:\n{''.join(log)}")
        subprocess.run(["python", "submit.py"], cwd=folder, env=environment, check=True)
        yield environment
    finally:
        (folder / "done").touch()
        up.terminate()
        up.communicate()
        subprocess.run(["celery", "-A", "platform", "down"], cwd=folder, env=environment, stdout=sys.stderr, check=True)


def await_backlog(folder: Path, environment: Mapping[str, str]) -> None:
    """Return when the jobs that fit run, and the others wait."""
    end = time.monotonic() + PATIENCE
    command = ["celery", "-A", "platform", "cluster", "--json"]
    while True:
        reply = json.loads(subprocess.check_output(command, cwd=folder, env=environment))
        waiting = sum(line["waiting"] for line in reply["backlog"])
        if (waiting, reply["resources"]["allocated_cpus"]) == (WAITING, ALLOCATED):
            return
        if time.monotonic() > end:
            raise TimeoutError(f"{WAITING} waiting jobs and {ALLOCATED} allocated CPUs do not come: {reply}")


def main() -> None:
    """Draw all pictures anew."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pictures-") as name, platform(Path(name)) as environment:
        await_backlog(Path(name), environment)
        for picture, commands in SCREENS.items():
            typed = [(command, screen(command, Path(name), environment)) for command in commands]
            (PICTURES / f"{picture}.svg").write_text(draw(picture, typed), encoding="utf-8")
            print(PICTURES / f"{picture}.svg")


if __name__ == "__main__":
    main()
