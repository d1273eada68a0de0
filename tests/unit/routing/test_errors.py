"""Errors: their text, their fields, the secrets that they never show, and that they survive a process boundary."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_capacity.routing import errors
from celery_capacity.routing.errors import PlatformError, mask_url, show

KINDS: list[type[PlatformError]] = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, PlatformError)
]


def make(kind: type[PlatformError]) -> PlatformError:
    if kind is errors.OutcomeUnknown:
        return errors.OutcomeUnknown("job-1")
    if kind is errors.PartlyAccepted:
        return errors.PartlyAccepted(7, ["job-8"])
    if kind is errors.SettingsError:
        return errors.SettingsError(["PLATFORM_CPUS='x' is wrong.", "PLATFORM_GPUS='y' is wrong."])
    return kind()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            errors.InvalidRequest("cpus=-1 is negative", value=-1, advice="cpus must be 0 or more."),
            "cpus=-1 is negative. cpus must be 0 or more.",
        ),
        (
            errors.NotAccepted(),
            "the job was not accepted. Nothing was written: submit it again when Postgres answers.",
        ),
        (
            errors.MessageTooLarge("the message has 9 bytes, 8 are allowed"),
            "the message has 9 bytes, 8 are allowed."
            " Pass a reference (a path, a key) instead of the data, or raise PLATFORM_MAX_MESSAGE.",
        ),
        (
            errors.MessageTooDeep("an argument is nested 51 levels deep, 50 are allowed"),
            "an argument is nested 51 levels deep, 50 are allowed."
            " Pass flatter data, a text that the task itself parses, or a reference (a path, a key).",
        ),
        (
            errors.BacklogFull("8 jobs or more wait already"),
            "8 jobs or more wait already."
            " Nothing was written: submit it again when fewer jobs wait, or raise PLATFORM_MAX_BACKLOG.",
        ),
        (
            errors.OutcomeUnknown("job-1"),
            "the connection broke while job job-1 was stored; it may have been accepted."
            " Submit it again with the same task_id: a job that was stored is not made twice.",
        ),
        (
            errors.LeaseLost(),
            "this attempt no longer holds the job."
            " Stop working on it: its result would be refused, and another attempt runs or ran.",
        ),
        (errors.Infeasible(), "no registered worker could hold it. Start a larger worker, or ask for less."),
        (
            errors.SettingsError(["NODE_NAME='a b' is wrong."]),
            "NODE_NAME='a b' is wrong. `celery -A platform settings` lists every setting with its default and unit.",
        ),
        (
            errors.SettingsError(["A is wrong.", "B is wrong."]),
            "2 settings are wrong:\n  A is wrong.\n  B is wrong.\n"
            "`celery -A platform settings` lists every setting with its default and unit.",
        ),
        (errors.NotMigrated(), "Postgres has not been migrated. Run `celery -A platform db upgrade`."),
        (
            errors.NoServers(),
            "no URL is set and no embedded servers run."
            " Set REDIS_URL and DATABASE_URL, or start embedded servers with `celery -A platform up`"
            " (they stay until `celery -A platform down`).",
        ),
        (
            errors.NameTaken("worker node-1 lives on host-7"),
            "worker node-1 lives on host-7."
            " Give this worker another name with NODE_NAME or -n, or stop the other one first.",
        ),
        (
            errors.StoreUnavailable("redis://host:6379/0 refuses connections"),
            "redis://host:6379/0 refuses connections. Check that the server runs and that REDIS_URL and DATABASE_URL"
            " name it, with the right user and password.",
        ),
        (
            errors.Unsupported("chord is not supported", advice="Use a group."),
            "chord is not supported. Use a group.",
        ),
        (errors.PlatformError(), "the platform cannot do this"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PlatformError) else "",
)
def test_each_error_says_what_is_wrong_and_what_to_do(error: PlatformError, text: str) -> None:
    assert str(error) == text


def test_the_tree_in_the_module_s_text_names_every_error() -> None:
    assert errors.__doc__ is not None
    for kind in KINDS:
        assert f" {kind.__name__} " in errors.__doc__.replace("\n", " ")


def test_references_are_stable_and_unique() -> None:
    assert [kind.reference for kind in KINDS] == [
        "platform-error",
        "invalid-request",
        "message-too-large",
        "message-too-deep",
        "not-retried",
        "not-accepted",
        "backlog-full",
        "outcome-unknown",
        "partly-accepted",
        "lease-lost",
        "infeasible",
        "wrong-settings",
        "not-migrated",
        "no-servers",
        "name-taken",
        "store-unavailable",
        "unsupported",
    ]


def test_an_invalid_request_is_a_value_error() -> None:
    assert issubclass(errors.InvalidRequest, ValueError)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickle_copy_and_celery_s_rebuilding(kind: type[PlatformError]) -> None:
    error = make(kind)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), kind(*error.args)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert again.to_problem() == error.to_problem()
    json.dumps(error.args)


@pytest.mark.parametrize("kind", KINDS)
def test_a_problem_is_json_with_the_members_of_rfc_9457(kind: type[PlatformError]) -> None:
    problem = json.loads(json.dumps(make(kind).to_problem()))
    assert problem["type"] == f"urn:celery-capacity:error:{kind.reference}"
    assert problem["title"] == kind.title
    assert 400 <= problem["status"] <= 599
    assert problem["detail"] == str(make(kind))
    assert problem["reference"] == kind.reference


def test_a_problem_carries_value_and_advice_when_there_are_any() -> None:
    problem = errors.InvalidRequest("no", value=-1, advice="Ask for more.").to_problem()
    assert (problem["value"], problem["advice"]) == ("-1", "Ask for more.")
    assert "value" not in errors.LeaseLost().to_problem()
    assert errors.OutcomeUnknown("job-1").to_problem()["job_id"] == "job-1"
    assert errors.SettingsError(["a", "b"]).to_problem()["problems"] == ["a", "b"]


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://:s3cret@host:6379/0", "redis://:***@host:6379/0"),
        ("postgresql://user:s3cret@host/db", "postgresql://user:***@host/db"),
        ("postgresql://user:p@ss/s3cret@host/db", "postgresql://user:***@host/db"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        (
            "postgresql://postgres@/postgres?host=/tmp/sockets",
            "postgresql://postgres@/postgres?host=/tmp/sockets",
        ),
        ("postgresql://h/db?user=me&password=s3cret&x=1", "postgresql://h/db?user=me&password=***&x=1"),
        ("cannot reach redis://:s3cret@h/0 now", "cannot reach redis://:***@h/0 now"),
        ("sentinel://:s3cret@a:1/0;sentinel://:s3cret@b:2/0", "sentinel://:***@a:1/0;sentinel://:***@b:2/0"),
        ("amqp://a:s3cret@h1//;amqp://b:s3cret@h2//", "amqp://a:***@h2//"),
    ],
)
def test_passwords_in_urls_are_masked(url: str, masked: str) -> None:
    assert mask_url(url) == masked


@given(password=st.text(st.characters(categories=("L", "N", "P", "S")), min_size=8).map(lambda text: f"<{text}>"))
def test_no_password_survives_masking(password: str) -> None:
    assert password not in mask_url(f"redis://user:{password}@host:6379/0")


def test_a_text_of_nothing_but_beginnings_of_urls_is_masked_at_once() -> None:
    # Quadratic, this would take an hour.
    assert mask_url("://a:" * 200_000) == "://a:" * 200_000
    assert mask_url("://a:" * 200_000 + "@") == "://a:***@"


def test_the_error_of_a_job_is_stored_without_passwords() -> None:
    assert errors.storable("cannot reach redis://:s3cret@h/0", 100) == "cannot reach redis://:***@h/0"


def test_an_error_never_shows_a_password() -> None:
    url = "redis://:s3cret@host/0"
    error = errors.StoreUnavailable(f"{url} does not answer", value=url, advice=f"Start {url}.")
    assert "s3cret" not in f"{error} {error!r} {error.args} {error.to_problem()}"
    assert "s3cret" not in str(errors.SettingsError([f"REDIS_URL={url!r} is wrong"]))


def test_a_long_value_is_shortened_to_eighty_characters() -> None:
    assert show("x" * 79) == repr("x" * 79)[:79] + "…"
    assert len(show(list(range(1000)))) == 80
    assert show("x" * 78) == repr("x" * 78)


def test_a_value_whose_repr_raises_is_still_shown() -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError

    assert show(Hostile()) == "<Hostile; its repr raises RuntimeError>"
    assert show(10**5000) == "<int; its repr raises ValueError>"
