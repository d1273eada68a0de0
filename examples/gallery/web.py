"""POST /pictures orders a picture; GET /pictures/<id> says how far it is. Serve: `uvicorn web:api --port=8080`."""

from celery import chain
from celery.result import AsyncResult
from fastapi import FastAPI, HTTPException
from gallery import app, frame, paint
from pydantic import BaseModel, Field

import celery_capacity

api = FastAPI()


class Order(BaseModel):
    """Body of an order. The name becomes part of a file name, so it has only plain characters."""

    name: str = Field(pattern="^[a-z0-9-]{1,40}$")
    urgent: bool = False


@api.post("/pictures", status_code=202)
def order(order: Order) -> dict[str, str]:
    """Submit both steps at once, and answer with their ids. A plain function: the call waits for Postgres."""
    priority = 9 if order.urgent else 0
    try:
        framed = chain(paint.s(order.name), frame.s()).apply_async(priority=priority)
    except celery_capacity.NotAccepted as error:
        raise HTTPException(503, str(error), {"Retry-After": "5"}) from error
    return {"id": framed.id, "painting": framed.parent.id}


@api.get("/pictures/{job_id}")
def look(job_id: str) -> dict[str, str | None]:
    """Say the state of a job as the platform has it: `waiting` is not `running`, and an unknown id is an error."""
    try:
        event = celery_capacity.job(job_id, app=app).now()
    except celery_capacity.InvalidRequest as error:
        raise HTTPException(404, str(error)) from error
    path = AsyncResult(job_id, app=app).get() if event.state == "succeeded" else None
    return {"state": event.state, "path": path}
