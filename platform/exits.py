"""Exit codes of the commands, each with its meaning; the numbers above 2 are those of sysexits.h and of
shells."""

from __future__ import annotations

from typing import Final

from routing.errors import NoServers, NotMigrated, PlatformError, SettingsError, StoreUnavailable

#: Done, and the answer is yes.
OK: Final = 0
#: Done, and the answer is no: a check failed, a job is unknown, drift could not be repaired.
FAILED: Final = 1
#: The command line is wrong (click's own number).
USAGE: Final = 2
#: A store does not answer.
UNAVAILABLE: Final = 69
#: Settings are wrong, or the tables are not those that this version needs.
CONFIGURATION: Final = 78
#: Ended by Ctrl-C (128 + SIGINT).
INTERRUPTED: Final = 130


def code_of(error: PlatformError) -> int:
    """The exit code of a command that ends with this error."""
    if isinstance(error, (StoreUnavailable, NoServers)):
        return UNAVAILABLE
    if isinstance(error, (SettingsError, NotMigrated)):
        return CONFIGURATION
    return FAILED
