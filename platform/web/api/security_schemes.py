"""Security schemes of the API's document: the ways to log in, and the role that each operation needs."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI

from celery_capacity.platform.web.http.login import COOKIE, Role

BEARER: Final = "bearer"
SESSION: Final = "session"
PROXY_USER: Final = "proxyUser"
#: Member of a path for a method that changes nothing.
READING: Final = "get"


def add_security_schemes(app: FastAPI, *, open_reading: bool, user_header: str | None) -> None:
    """Have the document name the security schemes. `open_reading`: reading needs no token.

    `user_header`: the header in which a trusted proxy names who acts.
    """
    schemes = _schemes(user_header)
    reading: list[dict[str, list[str]]] = [{BEARER: [Role.VIEWER.value]}, {SESSION: [Role.VIEWER.value]}]
    if open_reading:
        reading.append({})
    acting: list[dict[str, list[str]]] = [{BEARER: [Role.OPERATOR.value]}]
    if user_header:
        acting.append({BEARER: [Role.OPERATOR.value], PROXY_USER: []})
    make = app.openapi

    def document() -> dict[str, Any]:
        made = make()
        _without_foreign_errors(made)
        made.setdefault("components", {})["securitySchemes"] = schemes
        for path in made["paths"].values():
            for method, operation in path.items():
                operation["security"] = reading if method == READING else acting
        return made

    app.openapi = document  # type: ignore[method-assign]


def _without_foreign_errors(document: dict[str, Any]) -> None:
    """Take out the answer 422 that FastAPI writes for itself: here a wrong request is answered 400, with a problem."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document.get("components", {}).get("schemas", {}).pop(name, None)


def _schemes(user_header: str | None) -> dict[str, Any]:
    schemes: dict[str, Any] = {
        BEARER: {
            "type": "http",
            "scheme": "bearer",
            "description": "PLATFORM_TOKEN has the role operator, PLATFORM_VIEWER_TOKEN the role viewer. An operator"
            " may do all that a viewer may.",
        },
        SESSION: {
            "type": "apiKey",
            "in": "cookie",
            "name": COOKIE,
            "description": "The session of a login at /login, of either role. It reads. A browser sends it by itself,"
            " so it runs no action here. The forms of the pages act by it, with a form token against forgery (CSRF).",
        },
    }
    if user_header:
        schemes[PROXY_USER] = {
            "type": "apiKey",
            "in": "header",
            "name": user_header,
            "description": "The user that a trusted proxy has logged in, for the audit. It replaces no token.",
        }
    return schemes
