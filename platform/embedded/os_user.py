"""The owner of the embedded Postgres when root starts it, and the folders that this user can read and write.

Postgres refuses to run as root. For an ordinary user no function here changes anything.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from celery_capacity.platform.embedded.daemon import Owner
from celery_capacity.platform.embedded.starting import CannotStart

#: System user that owns only Postgres's processes and data. It is made when it is first needed.
USER = "celery-capacity"

#: Parent of the user's folders when root's folders are closed to it, as /root mostly is.
SYSTEM_FOLDER = Path("/var/lib/celery-capacity")

#: Seconds for another process to finish making the same user.
USER_SECONDS = 10.0

#: Seconds before the second try to make the user. Each later pause is twice as long.
FIRST_PAUSE = 0.05

_ADVICE = "Start this as an ordinary user, or set REDIS_URL and DATABASE_URL."

#: Commands that make the user: by the tools of most distributions, or by busybox.
_MAKE_USER = (
    ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent", USER],
    ["adduser", "-S", "-D", "-H", "-h", "/nonexistent", USER],
)


def owner() -> Owner | None:
    """Return the user for Postgres, or None for the caller's own unless the caller is root.

    Raises CannotStart if the user cannot be made.
    """
    if os.geteuid() != 0:
        return None
    entry = _user() or _make_user()
    return Owner(USER, entry.pw_uid, entry.pw_gid)


def _make_user() -> pwd.struct_passwd:
    """Make the user, in one process at a time.

    Of several `useradd` at once one may write back the list that it read before another added the user.
    """
    end = time.monotonic() + USER_SECONDS
    try:
        SYSTEM_FOLDER.mkdir(parents=True, exist_ok=True, mode=0o755)
        lock = os.open(SYSTEM_FOLDER, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CannotStart(
            f"the folder {str(SYSTEM_FOLDER)!r} for Postgres's user cannot be made or opened ({error.strerror})",
            value=str(SYSTEM_FOLDER),
            advice=_ADVICE,
        ) from error
    try:
        _wait_for(lock, end)
        pause, reason = FIRST_PAUSE, "neither useradd nor adduser is there"
        while (entry := _user()) is None:
            reason = _run_command() or reason
            if (entry := _user()) is not None:
                break
            if time.monotonic() + pause > end:
                raise _cannot_make(reason)
            # Another program may be making users at this moment.
            time.sleep(pause)
            pause *= 2
        return entry
    finally:
        os.close(lock)


def _wait_for(lock: int, end: float) -> None:
    """Take the lock once no other process has it. A user that is there by then ends the wait too."""
    pause = FIRST_PAUSE
    while _user() is None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() + pause > end:
                raise _cannot_make("another process is making it") from None
        time.sleep(pause)
        pause *= 2


def _run_command() -> str:
    """Run the first command that is there, and return its complaint; "" where it has none."""
    for command in _MAKE_USER:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        # The command also fails if a program beside this one makes the user at this moment.
        return done.stderr.strip()
    return ""


def _cannot_make(reason: str) -> CannotStart:
    message = f"Postgres does not run as root, and the user {USER!r} cannot be made ({reason})"
    return CannotStart(message, value=USER, advice=_ADVICE)


def _user() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        return None


def folder(wanted: Path, user: Owner | None, *, lasting: bool) -> Path:
    """Make the folder `wanted`, give it to the user, and return its resolved path.

    Where the user cannot reach it, the path becomes a link to a folder in another place. That place is under /var/lib
    for data that must last, else under the system's folder for temporary files.
    """
    if not wanted.exists():
        wanted.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if user is None or _open_to_all(wanted.parent.resolve()):
            wanted.mkdir(mode=0o700)
        else:
            parent = SYSTEM_FOLDER if lasting else Path(tempfile.gettempdir()).resolve()
            parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            # An older link whose target is gone is useless.
            wanted.unlink(missing_ok=True)
            wanted.symlink_to(tempfile.mkdtemp(prefix="postgres-", dir=parent))
    wanted = wanted.resolve()
    give(wanted, user)
    return wanted


def give(path: Path, user: Owner | None) -> None:
    if user is not None:
        os.chown(path, user.uid, user.gid)


def reachable_copy(package: Path, user: Owner | None) -> Path:
    """Return the installed package with Postgres's programs, or a copy if the user cannot run them there."""
    libraries = package.with_name(f"{package.name}.libs")
    if user is None or (_open_to_all(package) and _readable(package) and _readable(libraries)):
        return package
    # The name distinguishes installed versions. A change in place within one version would not be noticed.
    version = int((package / "pginstall" / "bin" / "postgres").stat().st_mtime)
    copy = SYSTEM_FOLDER / f"programs-{version}"
    if not copy.exists():
        SYSTEM_FOLDER.mkdir(parents=True, exist_ok=True, mode=0o755)
        fresh = Path(tempfile.mkdtemp(prefix="programs.new-", dir=SYSTEM_FOLDER))
        for source in (package, libraries):
            if source.exists():
                shutil.copytree(source, fresh / source.name, ignore=shutil.ignore_patterns("__pycache__", "include"))
        for path in (fresh, *fresh.rglob("*")):
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
        try:
            fresh.rename(copy)
        except OSError:
            # Another process was faster, and its copy is as good.
            shutil.rmtree(fresh)
    return copy / package.name


def _open_to_all(path: Path) -> bool:
    """Return True if every user may pass through the folder and the folders above it."""
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in (path, *path.parents))


def _readable(path: Path) -> bool:
    """Return True if every user may read all files in the folder, or if the folder does not exist."""
    if not path.exists():
        return True
    needed: Iterable[bool] = (
        bool(status.st_mode & stat.S_IROTH)
        and (not stat.S_ISDIR(status.st_mode) or bool(status.st_mode & stat.S_IXOTH))
        for status in (entry.lstat() for entry in path.rglob("*"))
    )
    return all(needed)
