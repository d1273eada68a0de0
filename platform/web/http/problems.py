"""Errors as `application/problem+json` (RFC 9457), each with what to do."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import compile_path

from celery_capacity.platform.console.command import problem_of_store
from celery_capacity.platform.web.prepared import to_json
from celery_capacity.routing.database.postgres_errors import translate
from celery_capacity.routing.errors import InvalidRequest, PlatformError, show

MEDIA_TYPE: Final = "application/problem+json"


class TooManyRequests(PlatformError):
    """A client asked too often, or too many clients follow the events."""

    reference = "too-many-requests"
    title = "there are too many requests"
    default_advice = "Ask again in a second, or follow /api/v1/events instead of asking again and again."
    status = 429


class NotLoggedIn(PlatformError):
    """The server has a token, and the request shows none, or a wrong one."""

    reference = "not-logged-in"
    title = "a token is needed"
    default_advice = "Send `Authorization: Bearer TOKEN` with the PLATFORM_TOKEN of the dashboard, or log in at /login."
    status = 401


class NotAllowed(PlatformError):
    """The request would change something, and shows no token of operators, or comes from another site."""

    reference = "not-allowed"
    title = "a token of operators is needed"
    default_advice = "Send `Authorization: Bearer TOKEN` with the PLATFORM_TOKEN of the dashboard."
    status = 403


class BodyTooLarge(PlatformError):
    """The body of a request is larger than the API takes."""

    reference = "body-too-large"
    title = "the body is too large"
    default_advice = "Send fewer jobs in one request, or pass a reference (a path, a key) instead of the data."
    status = 413


class NotConfirmed(PlatformError):
    """An action on many jobs was asked for without the number of jobs that it concerns, or with a wrong one."""

    reference = "not-confirmed"
    title = "the number of jobs is not confirmed"
    status = 409


class UnknownAction(PlatformError):
    """The audit has no action of this number."""

    reference = "unknown-action"
    title = "there is no such action"
    default_advice = "The audit keeps actions for PLATFORM_KEEP_AUDIT."
    status = 404


def plain_problem(status: int) -> dict[str, Any]:
    """Return the problem of a status that has no more to say."""
    return {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}


def problem_response(problem: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(problem), problem["status"], headers, media_type=MEDIA_TYPE)


def add_handlers(app: FastAPI) -> None:
    """Have the app answer each error with a problem. A defect gives nothing away, and its traceback goes to the log."""
    app.add_exception_handler(PlatformError, _on_purpose)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(RequestValidationError, _of_input)
    for kind in (RedisError, DBAPIError, PoolTimeout):
        app.add_exception_handler(kind, _of_store)
    app.add_exception_handler(Exception, _of_defect)


def _on_purpose(_request: Request, error: Exception) -> Response:
    assert isinstance(error, PlatformError)
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, NotLoggedIn) else {}
    if error.status in (429, 503):
        headers["Retry-After"] = "1"
    return problem_response(error.to_problem(), headers)


def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers |= _allow(request)
    return problem_response(plain_problem(error.status_code), headers)


def _allow(request: Request) -> dict[str, str]:
    """Return the header `Allow` of a path of the API; nothing for other paths.

    The router names the methods of its first route only, and each method of a path is a route.
    """
    paths: dict[str, Any] = request.app.openapi()["paths"]
    path = request.url.path
    # A path without parameters comes before a template that matches it too.
    templates = [path] if path in paths else [name for name in paths if compile_path(name)[0].match(path)]
    methods = sorted({method.upper() for template in templates for method in paths[template]})
    return {"Allow": ", ".join(methods)} if methods else {}


def _of_input(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    advice = "/api/v1/openapi.json has the parameters of each path."
    refused = InvalidRequest(f"{name} is not valid: {first['msg']}", value=first.get("input"), advice=advice)
    return problem_response(refused.to_problem())


def _of_store(request: Request, error: Exception) -> Response:
    problem = translate(error, "") if isinstance(error, PoolTimeout) else problem_of_store(error)
    return _of_defect(request, error) if problem is None else _on_purpose(request, problem)


def _of_defect(_request: Request, _error: Exception) -> Response:
    return problem_response(plain_problem(500))


def wrong_parameter(name: str, value: object, right: str) -> InvalidRequest:
    """Return the error for a parameter with a wrong value. `right`: the rule for a right one."""
    return InvalidRequest(f"{name}={show(value)} is not valid", value=value, advice=right)
