"""Entry point of the script `capacity`: Ctrl-C ends it without a traceback, from the first import on."""

from __future__ import annotations

import sys

from celery_capacity.workers import interrupts


def main() -> None:
    """Run the command of the command line."""
    interrupts.end_at_once(interrupts.command_of(sys.argv[1:]))
    # Imported only now, since it takes most of the start.
    from celery_capacity.platform.capacity import capacity
    from celery_capacity.workers.plugin import SCRIPT

    capacity(prog_name=SCRIPT)


if __name__ == "__main__":
    main()
