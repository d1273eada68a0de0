"""Exit codes of `celery -A platform ...`, as in sysexits.h and in shells, each with its meaning and its occasions.

docs/reference/exit-codes.md has this table too, and the help of each command names the codes that it can give.
"""

from __future__ import annotations

from enum import IntEnum

from celery_capacity.routing.errors import (
    NameTaken,
    NoServers,
    NotMigrated,
    PlatformError,
    SettingsError,
    StoreUnavailable,
    Unsupported,
)


class Exit(IntEnum):
    """Exit code of a command. A command that a signal ends has 128 + the signal's number in a shell's `$?`."""

    meaning: str
    when: str

    def __new__(cls, code: int, meaning: str, when: str) -> Exit:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        member.when = when
        return member

    OK = (0, "done, and the answer is yes", "also if there was nothing to do")
    FAILED = (
        1,
        "done, and the answer is no; or refused",
        "a check failed, there is no such job, drift is left, a port is taken, a value is not accepted. A defect of"
        " ours ends with it too, and with a traceback",
    )
    USAGE = (2, "the command line is wrong", "an unknown option, command or app (`-A`), a value outside its range")
    CANCELLED = (
        3,
        "a job did not run to its end, on purpose",
        "`wait`, `submit --wait`: a job was cancelled or expired, and none failed",
    )
    UNAVAILABLE = (
        69,
        "something needed is not available now",
        "a store does not answer, embedded servers cannot start; of `worker`: its name belongs to a live worker",
    )
    DEFECT = (70, "a fault of the platform", "only of `worker`: it could not join, and its log has the traceback")
    OUTPUT = (74, "the answer could not be written", "the disk that standard output goes to is full")
    CONFIGURATION = (
        78,
        "the configuration is wrong",
        "a setting is wrong, a store refuses the user, the password or the database, the tables are missing or of"
        " another version",
    )
    TIMED_OUT = (124, "it took too long", "`wait`, `submit --wait`: a job had not ended after `--timeout`")
    HANGUP = (129, "ended by a closed terminal", "128 + SIGHUP")
    INTERRUPTED = (130, "ended by Ctrl-C", "128 + SIGINT; `dashboard` ends with 0 then, and `up` once all was ready")
    BROKEN_PIPE = (
        141,
        "nobody reads the output any more",
        "128 + SIGPIPE, for example when `head -1` has read its line",
    )
    TERMINATED = (143, "ended by `kill`", "128 + SIGTERM; `dashboard` ends with 0 then, and `up` once all was ready")


def code_of(error: PlatformError) -> Exit:
    """Return the exit code of a command that ends with this error."""
    # Imported here: the help of a command needs no driver of a store.
    from celery_capacity.workers.process.waiting_for_stores import refused

    if isinstance(error, (SettingsError, NotMigrated, Unsupported)) or refused(error):
        return Exit.CONFIGURATION
    return Exit.UNAVAILABLE if isinstance(error, (StoreUnavailable, NoServers, NameTaken)) else Exit.FAILED
