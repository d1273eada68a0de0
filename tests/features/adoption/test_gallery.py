"""The second tutorial: a web app with a GPU worker, asked as over HTTP, with real workers."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import text

from tests.fixtures.documents.examples import EXAMPLES, move_into, python
from tests.fixtures.documents.replay import blocks_of
from tests.fixtures.processes.platforms import ROOT, Platform

#: Program that orders pictures and looks at one, before and after a GPU comes. It waits for a line between the two.
ORDERS = """
import json, time
from fastapi.testclient import TestClient
from web import api
client = TestClient(api)
def state(job, wanted):
    end = time.monotonic() + 30
    while (seen := client.get(f"/pictures/{job}").json())["state"] != wanted and time.monotonic() < end:
        time.sleep(0.02)
    return seen
made = client.post("/pictures", json={"name": "lion"})
print(json.dumps([
    made.status_code,
    state(made.json()["painting"], "WANTED"),
    client.post("/pictures", json={"name": "../lion"}).status_code,
    client.get("/pictures/nobody").status_code,
]))
"""


@pytest.mark.parametrize("gpus", [0, 1])
def test_pictures_are_painted_where_a_gpu_is(platform: Platform, gpus: int) -> None:
    folder = move_into(platform, "gallery", "gallery")
    platform.worker("cpu", cpus=4, pool="threads")
    if gpus:
        platform.worker("gpu", cpus=4, pool="threads", PLATFORM_GPUS="1")
    wanted = "succeeded" if gpus else "waiting"
    asked = python(platform, "-c", ORDERS.replace("WANTED", wanted))
    assert asked.returncode == 0, asked.stderr
    status, seen, hostile, unknown = json.loads(asked.stdout)
    assert (status, hostile, unknown) == (202, 422, 404)
    assert seen["state"] == wanted
    with platform.engine.connect() as connection:
        worker = connection.execute(text("SELECT worker FROM jobs WHERE name = 'gallery.paint'")).scalar_one()
    assert worker == ("gpu" if gpus else None)
    if gpus:
        assert (folder / "pictures" / "lion.pgm").stat().st_size > 64 * 64


def test_the_tutorial_has_the_files_of_the_example() -> None:
    blocks = [block for block in blocks_of(ROOT / "docs" / "tutorial-web-gpu.md") if block.language == "python"]
    assert len(blocks) == 3
    for block in blocks:
        name = block.lines[0].removeprefix("# ")
        assert "\n".join(block.lines[1:]).strip() == (EXAMPLES / "gallery" / name).read_text(encoding="utf-8").strip()
