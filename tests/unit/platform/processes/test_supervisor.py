"""A command's children: their output, their ends, and signals that reach them in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from celery_capacity.platform.processes.launch import ChildDied, Interrupted, NotReady, await_ready, pause
from celery_capacity.platform.processes.supervisor import Child, Step, Supervisor, died
from tests.fixtures.waiting import until

ROOT = Path(__file__).resolve().parents[4]

#: Seconds for a step that takes far less, on a busy machine.
PATIENCE = 60.0

#: Signals that are sent to this process, one after the other.
TURNS = 1000

#: Program that says that it is ready, and ends well at TERM.
GOOD = (
    "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit());"
    " print('x ready.', flush=True); signal.pause()"
)
#: Program that ignores TERM, and ends at QUIT.
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x ready.', flush=True); signal.pause()"
#: Program that ends only when it is killed, and has a child of its own that holds its output open.
DEAF = (
    "import os, signal\n"
    "for s in (signal.SIGTERM, signal.SIGQUIT): signal.signal(s, signal.SIG_IGN)\n"
    "child = os.fork()\n"
    "if child: print('forked', child, flush=True); print('x ready.', flush=True)\n"
    "while True: signal.pause()"
)


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    supervisor = Supervisor()
    yield supervisor
    supervisor.end(supervisor.children, (Step(signal.SIGKILL, PATIENCE),))
    supervisor.close()


def start(supervisor: Supervisor, code: str, name: str = "child") -> Child:
    return supervisor.start(name, [sys.executable, "-c", code], os.environ)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # not reaped yet
    except psutil.NoSuchProcess:
        return True


def test_a_child_is_ready_when_it_says_so(supervisor: Supervisor) -> None:
    child = start(supervisor, GOOD)
    assert await_ready(supervisor, [child], PATIENCE) == [child]
    assert list(child.last_lines) == ["x ready."]


def test_a_child_that_ends_before_it_is_ready_is_shown_with_its_last_words(supervisor: Supervisor) -> None:
    child = start(supervisor, "import sys; print('no such broker'); sys.exit(3)", "worker-01")
    with pytest.raises(ChildDied) as caught:
        await_ready(supervisor, [child], PATIENCE)
    assert "worker-01 ended with exit code 3" in str(caught.value)
    assert "no such broker" in str(caught.value)


def test_a_child_that_ended_before_anybody_looked_is_shown_too(supervisor: Supervisor) -> None:
    child = start(supervisor, "import sys; print('no such broker'); sys.exit(3)", "worker-01")
    until(lambda: child.code is not None, "the end of the child")
    with pytest.raises(ChildDied, match="worker-01 ended with exit code 3"):
        await_ready(supervisor, [child], PATIENCE)


def test_a_child_that_says_nothing_is_not_ready(supervisor: Supervisor) -> None:
    child = start(supervisor, "import signal; signal.pause()")
    with pytest.raises(NotReady, match="child"):
        await_ready(supervisor, [child], 0.2)


def test_a_killed_child_is_noticed_at_once_and_named_by_its_signal(supervisor: Supervisor) -> None:
    child = start(supervisor, GOOD)
    await_ready(supervisor, [child], PATIENCE)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildDied, match="child was ended by SIGKILL"):
        pause(supervisor, PATIENCE)
    assert died(child) == "child was ended by SIGKILL"


def test_a_pause_takes_its_time_when_nothing_happens(supervisor: Supervisor) -> None:
    before = time.monotonic()
    pause(supervisor, 0.05)
    assert time.monotonic() - before >= 0.05


def test_children_that_obey_end_at_the_first_step(supervisor: Supervisor) -> None:
    children = [start(supervisor, GOOD, name) for name in ("a", "b")]
    await_ready(supervisor, children, PATIENCE)
    supervisor.end(children, (Step(signal.SIGTERM, None),))
    assert [child.code for child in children] == [0, 0]
    assert supervisor.running() == []


def test_a_child_that_ignores_a_step_gets_the_next(supervisor: Supervisor) -> None:
    child = start(supervisor, STUBBORN)
    await_ready(supervisor, [child], PATIENCE)
    supervisor.end([child], (Step(signal.SIGTERM, 0.1), Step(signal.SIGQUIT, PATIENCE)))
    assert child.code == -signal.SIGQUIT


def test_a_deaf_child_is_killed_with_what_it_forked(supervisor: Supervisor) -> None:
    child = start(supervisor, DEAF)
    await_ready(supervisor, [child], PATIENCE)
    forked = int(child.last_lines[0].split()[1])
    supervisor.end([child], (Step(signal.SIGTERM, 0.1), Step(signal.SIGQUIT, 0.1)))
    assert child.code == -signal.SIGKILL
    until(lambda: gone(forked), "the end of the process")


def test_a_signal_becomes_an_event_and_interrupts_a_pause(supervisor: Supervisor) -> None:
    with supervisor.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted) as caught:
            pause(supervisor, PATIENCE)
    assert caught.value.code == 130


def test_a_signal_is_heard_whenever_it_comes(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them just before the main thread blocks, when no lock of Python's would wake up for it."""
    monkeypatch.setattr("celery_capacity.platform.processes.supervisor.SAME_SIGNAL", -1.0)
    turn = threading.Semaphore(0)

    def interrupt() -> None:
        for number in range(TURNS):
            turn.acquire()
            for _ in range(number % 400):  # the moment moves over the way into the queue
                pass
            os.kill(os.getpid(), signal.SIGHUP)

    thread = threading.Thread(target=interrupt, daemon=True)
    with supervisor.interruptible():
        thread.start()
        for _ in range(TURNS):
            turn.release()
            event = supervisor.next(PATIENCE)
            assert event is not None
            assert event.signum == signal.SIGHUP
        thread.join()


def test_the_same_signal_twice_at_once_counts_once(supervisor: Supervisor) -> None:
    with supervisor.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        first, second = supervisor.next(PATIENCE), supervisor.next(0.05)
    assert first is not None
    assert first.signum == signal.SIGTERM
    assert second is None


def test_another_signal_goes_on_to_the_next_step_at_once(supervisor: Supervisor) -> None:
    child = start(supervisor, STUBBORN)
    await_ready(supervisor, [child], PATIENCE)
    with supervisor.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        supervisor.end([child], (Step(signal.SIGTERM, None), Step(signal.SIGQUIT, PATIENCE)))
    assert child.code == -signal.SIGQUIT


def test_a_command_that_hears_nothing_is_broken_by_the_next_signal(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("celery_capacity.platform.processes.supervisor.UNHEARD", 0.0)
    monkeypatch.setattr("celery_capacity.platform.processes.supervisor.SAME_SIGNAL", 0.0)
    with supervisor.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: supervisor._unheard is not None, "the thread has the first signal")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Supervisor().interruptible():  # nothing was started: nothing to close
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_child_that_leaves_a_grandchild_at_its_output_still_ends(supervisor: Supervisor) -> None:
    code = "import os, time\nif os.fork() == 0:\n    time.sleep(30)\n    os._exit(0)\nos._exit(4)\n"
    child = start(supervisor, code)
    with pytest.raises(ChildDied, match="exit code 4"):
        pause(supervisor, PATIENCE)
    os.killpg(child.pid, signal.SIGKILL)


@pytest.mark.parametrize("orphans", [signal.SIGTERM, signal.SIGKILL])
def test_children_of_a_killed_command_do_not_stay(orphans: signal.Signals) -> None:
    code = (
        "import os, sys, signal\n"
        "from celery_capacity.platform.processes.supervisor import Supervisor\n"
        f"supervisor = Supervisor(orphans=signal.Signals({orphans.value}))\n"
        "child = supervisor.start('child', [sys.executable, '-c', sys.argv[1]], os.environ)\n"
        "supervisor.next()\n"
        "print(child.pid, flush=True)\n"
        "signal.pause()\n"
    )
    command = subprocess.Popen([sys.executable, "-c", code, GOOD], stdout=subprocess.PIPE, cwd=ROOT)
    assert command.stdout is not None
    with command.stdout as output:
        child = int(output.readline())
    assert not gone(child)
    command.kill()
    command.wait()
    until(lambda: gone(child), "the end of the process")


def test_a_guard_ends_children_that_a_closed_supervisor_has(supervisor: Supervisor) -> None:
    child = start(supervisor, GOOD)
    await_ready(supervisor, [child], PATIENCE)
    supervisor.close()
    until(lambda: gone(child.pid), "the end of the process")


def test_a_closed_terminal_and_a_lost_reader_hurry_no_end(supervisor: Supervisor) -> None:
    child = start(supervisor, STUBBORN)
    await_ready(supervisor, [child], PATIENCE)
    with supervisor.interruptible():
        os.kill(os.getpid(), signal.SIGHUP)
        supervisor.lost(signal.SIGPIPE)
        before = time.monotonic()
        supervisor.end([child], (Step(signal.SIGTERM, 0.5), Step(signal.SIGQUIT, PATIENCE)))
    assert time.monotonic() - before >= 0.5
    assert child.code == -signal.SIGQUIT


def test_a_command_started_by_nohup_hears_no_closed_terminal(supervisor: Supervisor) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with supervisor.interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            assert supervisor.next(0.05) is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_lost_reader_interrupts_a_pause(supervisor: Supervisor) -> None:
    supervisor.lost(signal.SIGPIPE)
    with pytest.raises(Interrupted) as caught:
        pause(supervisor, PATIENCE)
    assert caught.value.code == 141


def test_a_guard_is_dismissed_once_all_children_have_ended(supervisor: Supervisor) -> None:
    child = start(supervisor, GOOD)
    await_ready(supervisor, [child], PATIENCE)
    supervisor.end([child], (Step(signal.SIGTERM, None),))
    supervisor.close()
    assert child.code == 0
