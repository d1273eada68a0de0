"""POST /primes takes a job and answers at once; GET /jobs/<id> says what became of it. Serve: `uvicorn web:api`."""

from celery.result import AsyncResult
from fastapi import FastAPI, HTTPException, Response
from jobs import app, count_primes
from pydantic import BaseModel

from celery_capacity import InvalidRequest, NotAccepted

api = FastAPI()


class Primes(BaseModel):
    """Body of a request. `cpus` replaces the request of the task."""

    below: int
    cpus: float | None = None


# Plain functions, not `async def`: `apply_async` waits for Postgres (a millisecond), and FastAPI has threads for these.


@api.post("/primes", status_code=202)
def submit(primes: Primes, response: Response) -> dict[str, str]:
    """Submit a job. After the answer it is a row in Postgres, and outlives every process."""
    try:
        job = count_primes.apply_async([primes.below], cpus=primes.cpus)
    except InvalidRequest as error:
        raise HTTPException(422, str(error)) from error
    except NotAccepted as error:
        raise HTTPException(503, str(error), {"Retry-After": "5"}) from error
    response.headers["Location"] = f"/jobs/{job.id}"
    return {"id": job.id}


@api.get("/jobs/{job_id}")
def look(job_id: str) -> dict[str, object]:
    """Return Celery's state. `celery -A jobs job <id>` tells why a job waits."""
    result = AsyncResult(job_id, app=app)
    return {"state": result.state, "value": result.result if result.successful() else None}
