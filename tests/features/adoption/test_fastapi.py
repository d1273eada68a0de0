"""FastAPI: the project of examples/fastapi, asked as over HTTP, with a real worker."""

from __future__ import annotations

import json

from sqlalchemy import text

from tests.fixtures.documents.examples import move_into, python
from tests.fixtures.processes.platforms import Platform

#: Program that asks for work and looks until it is done. Then it asks for work that no platform accepts.
REQUESTS = """
import json, os, time
from fastapi.testclient import TestClient
from web import api
client = TestClient(api)
taken = client.post("/primes", json={"below": 100, "cpus": 0.5})
end = time.monotonic() + 30
while client.get(taken.headers["location"]).json()["state"] != "SUCCESS" and time.monotonic() < end:
    time.sleep(0.02)
done = client.get(taken.headers["location"])
wrong = client.post("/primes", json={"below": 100, "cpus": -1})
print(json.dumps([taken.status_code, taken.json()["id"], done.json(), wrong.status_code, wrong.json()["detail"]]))
"""


def test_work_is_taken_over_http_and_done_by_a_worker(platform: Platform) -> None:
    move_into(platform, "fastapi", "jobs")
    platform.worker("w", cpus=2, pool="threads")
    asked = python(platform, "-c", REQUESTS)
    assert asked.returncode == 0, asked.stderr
    taken, job, done, wrong, detail = json.loads(asked.stdout)
    assert (taken, done) == (202, {"state": "SUCCESS", "value": 25})
    assert wrong == 422
    assert "cpus" in detail
    with platform.engine.connect() as connection:
        query = text("SELECT worker, request FROM jobs WHERE id = :id")
        row = connection.execute(query, {"id": job}).one()
    assert (row.worker, row.request) == ("w", {"cpus": 0.5, "memory": 64 * 1024**2, "slots": 1})


def test_where_postgres_does_not_answer_the_answer_is_to_come_again(platform: Platform) -> None:
    move_into(platform, "fastapi", "jobs")
    ask = (
        "import json; from fastapi.testclient import TestClient; from web import api; "
        "answer = TestClient(api).post('/primes', json={'below': 9}); "
        "print(json.dumps([answer.status_code, answer.headers.get('retry-after')]))"
    )
    asked = python(platform, "-c", ask, DATABASE_URL="postgresql://nobody@127.0.0.1:1/nothing")
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout) == [503, "5"]
