"""The servers and tables of `up`, made in a thread. The main thread hears signals meanwhile, and shows the progress."""

from __future__ import annotations

from celery_capacity import migrations
from celery_capacity.platform.embedded import servers
from celery_capacity.platform.embedded.starting import Start
from celery_capacity.platform.processes.launch import Interrupted
from celery_capacity.platform.processes.speaker import SPIN, Speaker
from celery_capacity.platform.processes.supervisor import Supervisor
from celery_capacity.routing.config.settings import Settings

#: Seconds that a step may take before it is shown: most take less.
SILENT = 0.4


def make_servers(settings: Settings, supervisor: Supervisor, speaker: Speaker, beginning: Start) -> Settings:
    """Return the settings with the URLs of servers that run, and whose tables are up to date.

    Raises Interrupted at a signal. Embedded servers of a start that was interrupted have ended then. Also raises
    CannotStart and the errors of the migrations.
    """
    if settings.redis_url is None and not settings.home.exists():
        speaker.say(f"First start: making a Redis and a Postgres in {settings.home}. This takes about ten seconds.")

    def work() -> Settings:
        ready = servers.ensure(settings, speaker.say, beginning)
        beginning.step("Bringing the tables up to date.")
        migrations.upgrade(str(ready.database_url))
        return ready

    future = supervisor.beside(work, "servers")
    # A start of embedded servers ends its processes itself, so it is waited for. Given servers may not answer for long.
    interrupted = _attend(supervisor, speaker, beginning, wait=settings.redis_url is None)
    if interrupted is not None:
        raise interrupted
    return future.result()


def _attend(supervisor: Supervisor, speaker: Speaker, beginning: Start, *, wait: bool) -> Interrupted | None:
    """Show the progress until the start is done, and call it off at a signal, which is returned."""
    interrupted: Interrupted | None = None
    try:
        while True:
            event = supervisor.next(SPIN)
            text, age = beginning.present()
            if event is None:
                if interrupted is not None:
                    speaker.status("Interrupted. Ending what was started.")
                elif text and age >= SILENT:
                    speaker.status(text, f"({age:.0f} s)" if age >= 1 else "")
            elif event.what == "done":
                return interrupted
            elif event.what in ("signal", "lost") and interrupted is None:
                interrupted = Interrupted(event.signum)
                beginning.call_off()
                if not wait:
                    return interrupted
    finally:
        speaker.clear_status()
