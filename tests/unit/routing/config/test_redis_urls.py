"""Texts that name a Redis, and one text that serves all its readers."""

from __future__ import annotations

import pytest

from celery_capacity.routing.config import redis_urls
from celery_capacity.routing.config.redis_urls import Address, elsewhere, read
from celery_capacity.routing.errors import InvalidRequest


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", Address("redis", (("h", 6379),))),
        ("redis://h:1/", Address("redis", (("h", 1),))),
        ("redis://u:p%2Fw@h:1/3", Address("redis", (("h", 1),), "", "u", "p/w", 3)),
        ("redis://:pw@[::1]:1/3", Address("redis", (("::1", 1),), "", None, "pw", 3)),
        ("redis://h?db=2", Address("redis", (("h", 6379),), number=2)),
        ("rediss://h?ssl_ca_certs=/a%20b", Address("rediss", (("h", 6379),), query=(("ssl_ca_certs", "/a b"),))),
        ("unix:///run/r.sock", Address("unix", (), "/run/r.sock")),
        ("unix://u:p@/run/r.sock?db=4", Address("unix", (), "/run/r.sock", "u", "p", 4)),
        ("redis+socket:///run/r.sock?virtual_host=4", Address("unix", (), "/run/r.sock", number=4)),
        ("sentinel://a?master_name=m", Address("sentinel", (("a", 26379),), number=0, master="m")),
        (
            "sentinel://u:p@a:1/2;sentinel://b;sentinel://[::1]:3?master_name=m",
            Address("sentinel", (("a", 1), ("b", 26379), ("::1", 3)), "", "u", "p", 2, "m"),
        ),
        # A user, password or database that stands at every address counts once.
        ("sentinel://:p@a/2;sentinel://:p@b/2", Address("sentinel", (("a", 26379), ("b", 26379)), "", None, "p", 2)),
    ],
)  # fmt: skip
def test_a_url_names_a_place(url: str, address: Address) -> None:
    assert read(url) == address
    assert read(address.url) == address


def test_url_of_a_socket_or_of_sentinels_is_kept_as_celery_reads_it() -> None:
    kept = {
        "redis://h": "redis://h",
        "redis://h/1?x=y": "redis://h/1?x=y",
        "rediss://h": "rediss://h?ssl_cert_reqs=required",
        "unix://u:p%3A@/run/r.sock?db=4": "redis+socket://u:p%3A@/run/r.sock?virtual_host=4",
        "sentinel://:p@a:1/2;sentinel://b?master_name=m": ("sentinel://:p@a:1/2;sentinel://:p@b:26379/2?master_name=m"),
    }
    assert {url: redis_urls.check(url, "REDIS_URL") for url in kept} == kept
    assert {url: redis_urls.check(url, "REDIS_URL") for url in kept.values()} == {url: url for url in kept.values()}


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("unix://run/r.sock", "a socket has a path from the root"),
        ("unix:///r.sock?db=x", "a database is named by its number"),
        ("redis://h/name", "a database is named by its number"),
        ("sentinel://a;redis://b?master_name=m", "each address of several is a sentinel:// one"),
        ("redis://a;sentinel://b?master_name=m", "is not valid"),
        ("sentinel://a/1;sentinel://b/2?master_name=m", "the same user, password and database"),
        ("sentinel://a?master_name=m&ssl_ca_certs=/ca", "Sentinels take no ssl_ca_certs"),
        ("sentinel://a:1;sentinel://b:2", "how the Sentinels call the Redis"),
        ("sentinel://a:x?master_name=m", "is not valid"),
        ("http://h", "no Redis is named"),
    ],
)
def test_redis_url_is_refused_with_the_reason(url: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        redis_urls.check(url, "REDIS_URL")


@pytest.mark.parametrize("url", ["redis://u:s3c/ret@h:1/0", "redis://:s3cret@h:x/0", "sentinel://:s3cret@a/x"])
def test_no_password_is_in_the_error(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        redis_urls.check(url, "REDIS_URL")
    assert "s3c" not in str(caught.value)


def test_broker_and_results_may_be_elsewhere_and_celery_names_them() -> None:
    assert elsewhere("amqp://h//", "CELERY_BROKER_URL") == "amqp://h//"
    assert elsewhere("db+sqlite:///x", "CELERY_RESULT_BACKEND") == "db+sqlite:///x"
    assert elsewhere("unix:///run/r.sock", "CELERY_BROKER_URL") == "redis+socket:///run/r.sock?virtual_host=0"
    assert elsewhere("sentinel://a", "CELERY_BROKER_URL") == "sentinel://a:26379/0"
    with pytest.raises(InvalidRequest, match="CELERY_BROKER_URL"):
        elsewhere("sentinel://a/x", "CELERY_BROKER_URL")


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("redis://:p%40@h:1/7", "redis://:p%40@h:1/7"),
        ("redis://h/0?db=7", "redis://h:6379/7"),
        ("unix:///run/r.sock?db=7", "redis+socket:///run/r.sock?virtual_host=7"),
        ("sentinel://a/7;sentinel://b?master_name=m", "sentinel://a:26379/7;sentinel://b:26379/7?master_name=m"),
    ],
)
def test_address_is_written_as_the_url_that_kombu_reads(url: str, same: str) -> None:
    assert read(url).url == same
