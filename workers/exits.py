"""Exit codes of `worker`, those of sysexits.h."""

from __future__ import annotations

from typing import Final

#: The name belongs to another live worker (EX_UNAVAILABLE).
EX_NAME_TAKEN: Final = 69
#: A fault of ours (EX_SOFTWARE).
EX_SOFTWARE: Final = 70
#: The configuration is wrong, or a store is missing (EX_CONFIG).
EX_CONFIG: Final = 78
