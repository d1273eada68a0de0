"""Serializers, compression and security: the configured content is carried, and no other."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from kombu import serialization as serialize

from celery_capacity import InvalidRequest
from celery_capacity.routing.config.embedded import Pair
from tests.fixtures.jobs.setting_aside import number_set_aside, set_aside, until_set_aside
from tests.fixtures.jobs.submitting import RESULT_WITHIN, Submitter, standing_platform
from tests.fixtures.processes.platforms import ROOT, Platform

ADD = "tests.fixtures.tasks.add"
CONFIGURED = "tests.tasks.configured"
ACCEPTED = ["json", "msgpack", "yaml"]


@pytest.fixture(scope="module")
def platform(server_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Yield a platform with a worker that accepts three kinds of content."""
    with standing_platform(server_pair, tmp_path_factory.mktemp("content"), CONFIGURED) as running:
        running.worker("a", cpus=4, pool="threads", CONFIGURED=json.dumps({"accept_content": ACCEPTED}))
        yield running


@pytest.fixture
def plain(platform: Platform) -> Iterator[Celery]:
    url = platform.settings.redis_url
    with Celery("plain", broker=url, backend=url, set_as_current=False) as app:
        yield app


def test_what_is_accepted_is_carried_compressed_or_not(submitter: Submitter) -> None:
    submitter.app.conf.accept_content = ACCEPTED
    for serializer in ACCEPTED:
        for compression in (None, "gzip", "zlib", "bzip2"):
            job = submitter.send(ADD, 40, 2, serializer=serializer, compression=compression)
            assert submitter.value(job) == 42
            assert submitter.ended(job).state == "succeeded"


def test_so_is_what_plain_celery_sends(plain: Celery, submitter: Submitter) -> None:
    for protocol in (1, 2):
        plain.conf.task_protocol = protocol
        for serializer in ACCEPTED:
            for compression in (None, "zlib", "bzip2"):
                sent = plain.send_task(ADD, [40, 2], serializer=serializer, compression=compression)
                assert sent.get(timeout=RESULT_WITHIN) == 42
                assert submitter.ended(sent.id).state == "succeeded"


def test_nothing_else_is(plain: Celery, platform: Platform, submitter: Submitter) -> None:
    with pytest.raises(InvalidRequest, match="msgpack") as raised:
        submitter.send(ADD, 1, 2, serializer="msgpack")
    assert "accept_content" in raised.value.advice
    before = submitter.jobs()
    for protocol in (1, 2):
        plain.conf.task_protocol = protocol
        plain.send_task(ADD, [1, 2], serializer="pickle")
    rows = until_set_aside(platform, 2)
    assert all("pickle" in row.reason or "python-serialize" in row.reason for row in rows), rows
    assert submitter.jobs() == before


def packed(value: Any) -> bytes:
    data: bytes = serialize.dumps(value, "msgpack")[2]
    return data


def nested(levels: int) -> Any:
    levels_of_lists: Any = "x"
    for _ in range(levels):
        levels_of_lists = [levels_of_lists]
    return levels_of_lists


@pytest.mark.parametrize("protocol", [1, 2])
def test_no_body_is_deeper_or_larger_than_one_of_json_may_be(
    platform: Platform, submitter: Submitter, protocol: int
) -> None:
    def message(payload: bytes, kind: str, **headers: Any) -> str:
        envelope = {
            "body": base64.b64encode(payload).decode(),
            "content-type": f"application/x-{kind}",
            "content-encoding": "binary" if kind == "msgpack" else "utf-8",
            "headers": headers if protocol == 1 else {"task": ADD, "id": "large", **headers},
            "properties": {
                "body_encoding": "base64",
                "delivery_tag": "any",
                "delivery_info": {"exchange": "", "routing_key": "celery"},
            },
        }
        return json.dumps(envelope)

    def body(argument: Any) -> Any:
        return {"task": ADD, "id": "large", "args": [argument]} if protocol == 1 else [[argument], {}, {}]

    before = number_set_aside(platform)
    bomb = zlib.compress(packed(body("0" * 64 * 1024**2)))
    push = platform.redis.lpush
    push("celery", message(packed(body(nested(60))), "msgpack"))
    push("celery", message(serialize.dumps(body(nested(60)), "yaml")[2].encode(), "yaml"))
    # A short text may stand for thousands of millions of items.
    laughs = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(24)
    )
    push("celery", message(laughs.encode(), "yaml"))
    push("celery", message(bomb, "msgpack", compression="application/x-gzip"))
    push("celery", message(b"\xc1\xc1", "msgpack"))
    assert len(until_set_aside(platform, before + 5)) == before + 5
    assert submitter.row("large") is None


# -- signed messages


def make_key(folder: Path, name: str) -> Path:
    """Make a folder with a key and its certificate, and return it."""
    folder.mkdir()
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, plain))
    (folder / "cert.crt").write_bytes(certificate.public_bytes(pem))
    return folder


def send(platform: Platform, folder: Path, *ways: str) -> list[str]:
    """Return the ids of tasks that another process sent, signed with the key of a folder."""
    command = [sys.executable, "-m", "tests.tasks.signing", str(folder), *ways]
    done = subprocess.run(command, env=platform.environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.long
def test_signed_message_is_verified_before_it_is_stored_and_before_it_runs(
    server_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted, stranger = make_key(tmp_path / "known", "known"), make_key(tmp_path / "stranger", "stranger")
    with standing_platform(server_pair, tmp_path, CONFIGURED) as running:
        for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
            monkeypatch.delenv(name, raising=False)
        running.worker("a", cpus=2, pool="threads", SIGNED=str(trusted))
        submitter = Submitter(running)
        for job in send(running, trusted, "ours:1", "ours:2", "plain:1", "plain:2"):
            assert submitter.until(job, "succeeded").name == ADD
            assert submitter.value(job) == 42
        # The messages have an unknown signer, a changed body, and no signature.
        *others, job = send(running, stranger, "plain:2", "plain:1", "ours:2")
        Celery("plain", broker=running.settings.redis_url, set_as_current=False).send_task(ADD, [1, 2])
        rows = until_set_aside(running, 3)
        changed = json.loads(next(row.raw for row in rows if b"application/data" in row.raw))
        changed["body"] = base64.b64encode(b"bm90aGluZw==").decode()
        running.redis.lpush("celery", json.dumps(changed))
        until_set_aside(running, 4)
        assert [submitter.row(other) for other in others] == [None, None]
        # A submitter need not verify its own signatures: the worker does.
        row = submitter.ended(job)
        assert (row.state, row.worker) == ("failed", "a")
        assert len(set_aside(running)) == 4
        assert submitter.jobs() == 5
        submitter.close()
