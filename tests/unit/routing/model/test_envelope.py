"""Digest of a received message: that of the pushed message, whatever its tag, and no other for a changed one."""

from __future__ import annotations

import json

import pytest

from celery_capacity.routing.model import envelope

MESSAGE = (
    b'{"body":"W10=","content-encoding":"utf-8","content-type":"application/json","headers":{"task":"add"},'
    b'"properties":{"delivery_info":{"exchange":"","routing_key":"celery"},"body_encoding":"base64"}}'
)


def tagged(tag: str, *, message: bytes = MESSAGE) -> bytes:
    """Return the message with a tag as the script writes it, which escapes slashes too."""
    text = json.dumps(tag, ensure_ascii=False).replace("/", "\\/").encode()
    return message[:-2] + b',"delivery_tag":' + text + b"}}"


@pytest.mark.parametrize("job", ["5b9b5c5e", "a/b", 'say "x"', "back\\slash", "größe", 'x","delivery_tag":"y'])
def test_digest_is_that_of_the_message_without_its_tag(job: str) -> None:
    read = envelope.read(tagged(f"{job}:1.2"))
    assert read.tag == f"{job}:1.2"
    assert envelope.digest(read) == envelope.digest_of(MESSAGE)


def test_digest_of_a_changed_message_differs() -> None:
    changed = envelope.read(tagged("job:1.2", message=MESSAGE.replace(b"add", b"sub")))
    assert envelope.digest(changed) != envelope.digest_of(MESSAGE)


@pytest.mark.parametrize("tag", ['"job:1.2","more":1', '"job:1.2"  '])
def test_message_with_more_behind_its_tag_has_no_digest(tag: str) -> None:
    read = envelope.read(MESSAGE[:-2] + b',"delivery_tag":' + tag.encode() + b"} }")
    assert read.tag == "job:1.2"
    assert envelope.digest(read) == envelope.digest_of(b"")


def test_tag_that_the_end_only_looks_like_is_not_taken() -> None:
    """The text at the end, taken as it is, would be another tag with a backslash."""
    read = envelope.read(MESSAGE[:-2] + b',"delivery_tag":"a\\u0062:1.2"}}')
    assert read.tag == "ab:1.2"
    read["properties"]["delivery_tag"] = "a\\u0062:1.2"
    assert envelope.digest(read) == envelope.digest_of(b"")
