"""Every error of the platform that a person may meet.

::

    PlatformError
    ├── InvalidRequest       an amount, a name or an argument is wrong; nothing was written. Also a ValueError
    │   ├── MessageTooLarge  the message has more bytes than are allowed
    │   ├── MessageTooDeep   lists and dicts in the message are nested deeper than is allowed
    │   └── NotRetried       this job cannot be retried
    ├── NotAccepted          the job could not be stored; nothing was written
    │   └── BacklogFull      more jobs wait than are allowed
    ├── OutcomeUnknown       the connection broke around the commit: the job may have been stored
    ├── PartlyAccepted       some of many jobs were accepted, then one was not
    ├── LeaseLost            this attempt no longer holds its job
    ├── Infeasible           no registered worker could hold the job; it has failed
    ├── SettingsError        one or more settings are wrong, all of them named
    ├── NotMigrated          the tables are missing or older than the code
    ├── NoServers            no URL is set and no embedded servers run
    ├── NameTaken            a live worker has this name already
    ├── StoreUnavailable     Redis or Postgres does not answer
    └── Unsupported          a feature of Celery that the platform does not offer

Each error keeps its parts separate: the problem (`message`), the offending `value` as text, and the remedy (`advice`).
So one object reads well in a traceback, in a terminal and as ``application/problem+json``. `reference` is stable:
programs may compare it. Passwords in URLs are masked on the way in, so no error can leak one.

`cls(*error.args)` makes the error again. So an error survives pickling between processes. It also survives Celery,
which rebuilds exceptions from JSON in this way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

#: characters of a value that a message shows; a longer value is cut
SHOWN_CHARACTERS = 80

# Reads up to the next space, once. A search that began anew at each "://" would take hours on a text of nothing else.
_AUTHORITY = re.compile(r"://([^\s:/@?#]*):(\S*)")
_NEXT_ADDRESS = re.compile(";sentinel(?=://)")
_PASSWORD_IN_QUERY = re.compile(r"([?&](?:password|passwd|sslpassword|secret|token)=)[^&\s#'\"]*", re.IGNORECASE)


def mask_url(text: str) -> str:
    """Return the text with the passwords of all URLs in it replaced by ``***``; users, hosts and paths stay."""
    # Where several Sentinel addresses stand together, each shows its host.
    each = (_AUTHORITY.sub(_without_password, part) for part in _NEXT_ADDRESS.split(text))
    return _PASSWORD_IN_QUERY.sub(r"\1***", ";sentinel".join(each))


def _without_password(match: re.Match[str]) -> str:
    """Mask a password up to the last "@", so that one with an unescaped "@", "/" or ":" is masked whole."""
    _, at, rest = match[2].rpartition("@")
    return f"://{match[1]}:***@{rest}" if at else match[0]


def show(value: object) -> str:
    """Return `repr` of a value for a message: passwords masked, at most `SHOWN_CHARACTERS`. Never raises."""
    try:
        text = repr(value)
    except Exception as error:  # a foreign __repr__ may do anything, and this is already the error path
        text = f"<{type(value).__name__}; its repr raises {type(error).__name__}>"
    text = mask_url(text)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def storable(text: str, characters: int) -> str:
    """Return an error's text in a form that both stores can hold; of a longer text, its beginning.

    Postgres refuses the character NUL. UTF-8 has no half of a surrogate pair, and file names that are not UTF-8 come
    with such halves. Passwords in URLs are masked.
    """
    if not text:
        # The end of most attempts.
        return ""
    return mask_url(text)[:characters].replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")


class PlatformError(Exception):
    """Base of all errors that the platform raises on purpose; catching it catches nothing else."""

    #: stable name of the kind of error; programs compare it
    reference: ClassVar[str] = "platform-error"
    #: this kind of error in one phrase; also the message where none is given
    title: ClassVar[str] = "the platform cannot do this"
    #: remedy for an error that is raised without advice of its own
    default_advice: ClassVar[str] = ""
    #: status code of an HTTP answer with this error
    status: ClassVar[int] = 500

    message: str
    value: str | None
    advice: str
    #: True once the counter of its refusal has it.
    counted = False

    def __init__(self, message: str = "", *, value: object = None, advice: str = "") -> None:
        self.message = mask_url(message) or self.title
        self.value = None if value is None else show(value)
        self.advice = mask_url(advice) or self.default_advice
        super().__init__(self.message)

    def __str__(self) -> str:
        if not self.advice:
            return self.message
        end = "" if self.message.endswith((".", "!", "?", ":", ";")) else "."
        return f"{self.message}{end} {self.advice}"

    def to_problem(self) -> dict[str, Any]:
        """Return the error as an RFC 9457 object, the body of an ``application/problem+json`` answer."""
        problem: dict[str, Any] = {
            "type": f"urn:celery-capacity:error:{self.reference}",
            "title": self.title,
            "status": self.status,
            "detail": str(self),
            "reference": self.reference,
        }
        if self.value is not None:
            problem["value"] = self.value
        if self.advice:
            problem["advice"] = self.advice
        return problem


class InvalidRequest(PlatformError, ValueError):
    """An amount, a name, an id, a priority, a time or a header is wrong. Raised before anything is written."""

    reference = "invalid-request"
    title = "the request is not valid"
    status = 400


class MessageTooLarge(InvalidRequest):
    """The message has more bytes than `PLATFORM_MAX_MESSAGE` allows."""

    reference = "message-too-large"
    title = "the message is too large"
    default_advice = "Pass a reference (a path, a key) instead of the data, or raise PLATFORM_MAX_MESSAGE."
    status = 413


class MessageTooDeep(InvalidRequest):
    """Lists and dicts in the arguments or headers are nested too deep: every reader has to recurse."""

    reference = "message-too-deep"
    title = "the message is nested too deep"
    default_advice = "Pass flatter data, a text that the task itself parses, or a reference (a path, a key)."


class NotRetried(InvalidRequest):
    """The job cannot be retried: it has not ended or has succeeded, has a retry, is archived, or is part of a chord."""

    reference = "not-retried"
    title = "the job cannot be retried"
    status = 409


class NotAccepted(PlatformError):
    """Postgres did not store the job, and nothing was written: submitting it again cannot double it.

    Postgres is down, locked, out of connections, or stalled before the insert was sent.
    """

    reference = "not-accepted"
    title = "the job was not accepted"
    default_advice = "Nothing was written: submit it again when Postgres answers."
    status = 503


class BacklogFull(NotAccepted):
    """`PLATFORM_MAX_BACKLOG` jobs wait already, so no more are accepted. Nothing was written."""

    reference = "backlog-full"
    title = "the backlog is full"
    default_advice = "Nothing was written: submit it again when fewer jobs wait, or raise PLATFORM_MAX_BACKLOG."
    status = 429


class OutcomeUnknown(PlatformError):
    """The connection broke around the commit: the job `job_id` may have been stored, or not.

    Submitting again under the same id is safe: a job that is there already is not made twice.
    """

    reference = "outcome-unknown"
    title = "it is not known whether the job was stored"
    default_advice = "Submit it again with the same task_id: a job that was stored is not made twice."
    status = 503

    job_id: str

    def __init__(self, job_id: str, message: str = "", *, advice: str = "") -> None:
        text = message or f"the connection broke while job {job_id} was stored; it may have been accepted"
        super().__init__(text, value=job_id, advice=advice)
        self.job_id = job_id
        self.args = (job_id, self.message)

    def to_problem(self) -> dict[str, Any]:
        return {**super().to_problem(), "job_id": self.job_id}


class PartlyAccepted(PlatformError):
    """Only the first `accepted` of the jobs that were submitted together are durable.

    The next job was not accepted; the reason is this error's cause. `unknown`: the ids of the jobs that follow, where
    the connection broke around their commit.
    """

    reference = "partly-accepted"
    title = "some of the jobs were accepted"
    default_advice = "Submit the others again, not those that were accepted: they run."
    status = 503

    accepted: int
    unknown: tuple[str, ...]

    def __init__(self, accepted: int, unknown: Sequence[str] = (), message: str = "", *, advice: str = "") -> None:
        text = message or f"{accepted} jobs were accepted, then one was not"
        super().__init__(text, advice=advice)
        self.accepted, self.unknown = accepted, tuple(unknown)
        self.args = (accepted, self.unknown, self.message)

    def to_problem(self) -> dict[str, Any]:
        return {**super().to_problem(), "accepted": self.accepted, "unknown": list(self.unknown)}


class LeaseLost(PlatformError):
    """The attempt no longer holds its job: the job was taken back, and another attempt may speak for it."""

    reference = "lease-lost"
    title = "this attempt no longer holds the job"
    default_advice = "Stop working on it: its result would be refused, and another attempt runs or ran."
    status = 409


class Infeasible(PlatformError):
    """No registered worker could hold the job, not even an empty one, for `PLATFORM_FAIL_INFEASIBLE_AFTER` seconds.

    The job failed without a start. Its result raises this error.
    """

    reference = "infeasible"
    title = "no registered worker could hold it"
    default_advice = "Start a larger worker, or ask for less."
    status = 409

    @classmethod
    def is_told_by(cls, error: str | None) -> bool:
        """Return True if the error in a job's row is this one."""
        return error is not None and error.startswith(cls.title)


class SettingsError(PlatformError):
    """Some settings are wrong. `problems` has a sentence for each of them, and the message has them all."""

    reference = "wrong-settings"
    title = "settings are wrong"
    default_advice = "`celery -A platform settings` lists every setting with its default and unit."

    problems: tuple[str, ...]

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(mask_url(problem) for problem in problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            count = len(self.problems)
            message = "\n".join([f"{count} settings are wrong:", *(f"  {problem}" for problem in self.problems)])
        super().__init__(message)
        self.args = (self.problems,)

    def __str__(self) -> str:
        separator = "\n" if len(self.problems) > 1 else " "
        return f"{self.message}{separator}{self.advice}"

    def to_problem(self) -> dict[str, Any]:
        return {**super().to_problem(), "problems": list(self.problems)}


class NotMigrated(PlatformError):
    """The platform's tables are missing in Postgres, older than this version needs, or of a newer format.

    The ledger may also be of a newer format.
    """

    reference = "not-migrated"
    title = "Postgres has not been migrated"
    default_advice = "Run `celery -A platform db upgrade`."
    status = 503


class NoServers(PlatformError):
    """`REDIS_URL` and `DATABASE_URL` are not set, and no embedded servers run. Submitting never starts any."""

    reference = "no-servers"
    title = "no URL is set and no embedded servers run"
    default_advice = (
        "Set REDIS_URL and DATABASE_URL, or start embedded servers with `celery -A platform up`"
        " (they stay until `celery -A platform down`)."
    )
    status = 503


class NameTaken(PlatformError):
    """A live worker has this name. Two workers with one name would share one book of capacity."""

    reference = "name-taken"
    title = "a live worker has this name already"
    default_advice = "Give this worker another name with NODE_NAME or -n, or stop the other one first."
    status = 409


class StoreUnavailable(PlatformError):
    """Redis or Postgres does not answer; nothing can be said about its content."""

    reference = "store-unavailable"
    title = "a store does not answer"
    default_advice = (
        "Check that the server runs and that REDIS_URL and DATABASE_URL name it, with the right user and password."
    )
    status = 503


class Unsupported(PlatformError):
    """The platform does not work with this feature of Celery, this server or this database.

    Ignoring the feature would run the wrong thing, or lose it.
    """

    reference = "unsupported"
    title = "this is not supported"
    status = 501


# Programs import the errors from `celery_capacity`. A result names its error by that module too, wherever this file
# lies.
for _error in [value for value in vars().values() if isinstance(value, type) and issubclass(value, PlatformError)]:
    _error.__module__ = "celery_capacity"
del _error
