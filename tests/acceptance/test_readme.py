"""README as a newcomer reads it: its Python runs, its commands do what it shows, its redis-cli and curl lines answer.

A `console` block is replayed line by line; what a command says must have the lines that README shows of it, compared
by their first two words with every number made 0. A Python block is saved under the name in its first line, and run
unless a `$ python` line or an import does so. redis-cli goes through redis-py, curl through urllib.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from routing.home import running_pair
from tests.fixtures.processes import FOREIGN, ROOT, Process
from tests.fixtures.servers import TENTH
from tests.fixtures.waiting import until

#: Seconds for a command or a script that ends by itself, on a busy machine.
PATIENCE: Final = 60.0

#: Seconds within which Postgres says of a job what the ledger says.
SOON: Final = 10.0

#: Commands of Celery that stay, and what they say when they can be used.
STAYS: Final = {
    "up": "Ctrl-C ends the workers",
    "worker": " ready.",
    "beat": "is starting",
    "dashboard": "Dashboard:",
    "flower": "Visit me at",
}

#: What moves the person and not the platform: the environment, and the folder of one's files.
MOVES: Final = (". .venv/bin/activate", "cd ~/try")

#: The sleep that stands for work ends when the test has looked, not after a time.
WORK: Final = "time.sleep(seconds)"
LOOKED_AT: Final = "looked-at"
HELD: Final = f'[time.sleep(0.05) for _ in range(int(seconds * 20)) if not __import__("os").path.exists("{LOOKED_AT}")]'

UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and its lines."""

    language: str
    lines: tuple[str, ...]

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Each line after a `$`, and the lines shown below it."""
        shown: list[str] = []
        command = ""
        for line in (*self.lines, "$ "):
            if not line.startswith("$ "):
                shown.append(line)
                continue
            if command:
                yield command, shown
            command, shown = line[2:], []


def sections(path: Path) -> dict[str, list[Block]]:
    """The blocks of a document by the heading (##) above them, in order."""
    found: dict[str, list[Block]] = {"": []}
    heading, language, inside = "", "", False
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if inside:
                found[heading].append(Block(language, tuple(lines)))
            inside, language, lines = not inside, line[3:].strip(), []
        elif inside:
            lines.append(line)
        elif line.startswith("## "):
            heading = line[3:]
            found[heading] = []
    return found


def beginning(line: str) -> str:
    """The first two words of a line, up to what README leaves out, without its numbers and bars."""
    plain = re.sub(r"\d[\d.,:-]*", "0", UUID.sub("ID", line.partition("…")[0]))
    return " ".join(re.sub(r"[█░]+", " ", plain).split()[:2])


def missing(shown: list[str], said: list[str]) -> list[str]:
    """The beginnings of lines that README shows and the command did not say."""
    beginnings = [beginning(line) for line in said]
    lines = filter(None, map(beginning, shown))
    return [line for line in lines if not any(one.startswith(line) for one in beginnings)]


def assert_says(command: str, shown: list[str], said: list[str]) -> None:
    lacks = missing(shown, said)
    assert not lacks, f"README shows {lacks} below `{command}`, which said:\n" + "\n".join(said)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Terminal:
    """Where the lines of README are typed: a folder, an environment, and what was left running."""

    def __init__(self, folder: Path, **environment: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.running: list[Process] = []
        #: README's ports and ids, and what stands for them here.
        self.instead = {":8000": f":{free_port()}", "=5555": f"={free_port()}"}
        self.instead[":5555"] = self.instead["=5555"].replace("=", ":")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        self.environment = {
            **kept,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "PLATFORM_DASHBOARD": f"127.0.0.1{self.instead[':8000']}",
            "PLATFORM_HOME": str(folder / "home"),
            **environment,
        }

    def replay(self, blocks: list[Block]) -> None:
        typed = [command for block in blocks if block.language == "console" for command, _ in block.commands()]
        written = [line for block in blocks if block.language == "python" for line in block.lines]
        for block in blocks:
            if block.language == "console":
                for command, shown in block.commands():
                    self.type(command, shown)
            elif block.language == "python":
                name = block.lines[0].removeprefix("# ")
                assert re.fullmatch(r"\w+\.py", name), f"the first line of a Python block names its file: {name}"
                (self.folder / name).write_text("\n".join(block.lines).replace(WORK, HELD) + "\n", encoding="utf-8")
                imported = any(line.startswith(f"from {name[:-3]} import") for line in written)
                if not imported and not any(command.startswith(f"python {name}") for command in typed):
                    self.run(f"python {name}", {})

    def type(self, command: str, shown: list[str]) -> None:
        """One line after a `$`, held against what README shows of it."""
        if command in MOVES:
            return
        written = command
        for there, here in self.instead.items():
            written = written.replace(there, here)
        words = shlex.split(written)
        more = {}
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            more[name] = value
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        elif words[0] == "export":
            name, _, value = words[1].partition("=")
            self.environment.setdefault(name, value)
        elif words[0] == "redis-cli":
            # Of a hash the names; its values are this machine's.
            every = 2 if words[1] == "HGETALL" else 1
            assert_says(command, shown[::every], self.redis_cli(words[1:])[::every])
        elif words[0] == "curl":
            self.curl(words[-1], shown)
        elif words[0] == "celery" and words[3] in STAYS:
            process = Process(words[3], words, {**self.environment, **more}, self.folder)
            self.running.append(process)
            process.wait_for(STAYS[words[3]])
            assert_says(command, shown, list(process.lines))
        else:
            assert words[0] in ("celery", "python"), f"nobody said how to replay `{command}`"
            said = self.run(shlex.join(words), more)
            end = time.monotonic() + SOON
            while words[0] == "celery" and missing(shown, said) and time.monotonic() < end:
                said = self.run(shlex.join(words), more)
            assert_says(command, shown, said)
            self.remember("\n".join(shown), "\n".join(said))

    def remember(self, shown: str, said: str) -> None:
        """The id that README shows stands for the one that this command gave, in the lines that follow."""
        there, here = UUID.search(shown), UUID.search(said)
        if there and here:
            self.instead.setdefault(there[0], here[0])

    def run(self, command: str, more: dict[str, str]) -> list[str]:
        """What a command says that ends by itself, and with success."""
        done = subprocess.run(
            shlex.split(command),
            env={**self.environment, **more},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, f"`{command}` ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return [*done.stdout.splitlines(), *done.stderr.splitlines()]

    def redis_cli(self, words: list[str]) -> list[str]:
        """What redis-cli would print on a terminal."""
        pair = running_pair(Path(self.environment["PLATFORM_HOME"]))
        assert pair is not None
        with redis.Redis.from_url(pair.redis_url) as client:
            answer: Any = client.execute_command(*words)
        if isinstance(answer, dict):
            answer = [part for item in answer.items() for part in item]
        if isinstance(answer, list):
            return [f'{number}) "{part.decode()}"' for number, part in enumerate(answer, 1)]
        return [f"(integer) {answer}" if isinstance(answer, int) else f'"{answer.decode()}"']

    def curl(self, url: str, shown: list[str]) -> None:
        """The answer has the fields that README shows, all the way down; text is the same text."""

        def answer() -> str:
            try:
                with urllib.request.urlopen(url, timeout=PATIENCE) as response:
                    return str(response.read().decode())
            except ConnectionError:
                return ""

        body = until(answer, f"{url} answers")
        if not body.startswith("{"):
            assert body.splitlines() == shown
            return
        fields = set(re.findall(r'"(\w+)":', "\n".join(shown)))
        assert fields
        assert fields <= set(re.findall(r'"(\w+)":', body))
        assert json.loads(body)["source"] == "ledger"

    def ctrl_c(self) -> None:
        """In the terminal of `up`; the other processes that stay are ended too."""
        for process in reversed(self.running):
            process.signal(signal.SIGINT if process.name == "up" else signal.SIGTERM)
        for process in reversed(self.running):
            code = process.finish(PATIENCE)
            assert process.name != "up" or code == 0, process.tail()
        self.running.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "try"


README: Final = sections(ROOT / "README.md")


def test_the_two_commands_are_there(folder: Path) -> None:
    Terminal(folder).replay([Block("console", tuple(b.lines)) for b in README["See it work"]])
    first = [command for block in README["See it work"] for command, _ in block.commands()]
    assert first == ["make demo", "make test"]


@pytest.mark.long
def test_a_newcomer_runs_tasks_looks_at_them_and_ends_it(folder: Path) -> None:
    # The settings of a newcomer, who has none.
    terminal = Terminal(folder)
    try:
        terminal.replay(README["Run your own tasks"])
        terminal.replay(README["Look at it"])
        (folder / LOOKED_AT).touch()
        terminal.replay(README["Say what a call needs"])
        terminal.replay(README["Flower and beat"])
        terminal.ctrl_c()
    finally:
        for process in terminal.running:
            process.kill()
        terminal.replay(README["End it"])
    assert running_pair(folder / "home") is None


@pytest.mark.long
@pytest.mark.parametrize("section", ["Real servers", "A project that exists"])
def test_with_servers_of_ones_own(section: str, folder: Path, redis_url: str, database_url: str) -> None:
    # Without processes for each CPU: this one may have many.
    own = {"REDIS_URL": redis_url, "DATABASE_URL": database_url, "PLATFORM_CPUS": "4", **TENTH}
    terminal = Terminal(folder, **own)
    try:
        terminal.replay(README[section])
        terminal.ctrl_c()
    finally:
        for process in terminal.running:
            process.kill()


def test_every_section_with_lines_to_type_is_replayed() -> None:
    replayed = {"See it work", "Run your own tasks", "Look at it", "Say what a call needs", "Flower and beat", "End it"}
    assert {name for name, blocks in README.items() if blocks} == replayed | {"Real servers", "A project that exists"}


def test_the_chinese_readme_has_the_same_lines() -> None:
    chinese = [block for blocks in sections(ROOT / "README.zh.md").values() for block in blocks]
    assert chinese == [block for blocks in README.values() for block in blocks]
