"""JSON answers with a tag (`ETag`), by which a client that has the value already is not sent it again."""

from __future__ import annotations

from hashlib import sha256
from http import HTTPStatus
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

#: Characters of a tag.
LENGTH: Final = 32


class Tagged(Response):
    """Answer as JSON. A read whose `If-None-Match` names its tag is answered 304, without the value."""

    media_type = "application/json"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET":
            tag = f'"{sha256(self.body).hexdigest()[:LENGTH]}"'
            self.headers["ETag"] = tag
            if is_named(tag, Headers(scope=scope).get("if-none-match", "")):
                await Response(status_code=HTTPStatus.NOT_MODIFIED, headers={"ETag": tag})(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def is_named(tag: str, header: str) -> bool:
    """Return True if a header `If-None-Match` names a tag. A proxy that packs an answer makes its tag a weak one."""
    return any(name.strip().removeprefix("W/") in (tag, "*") for name in header.split(","))
