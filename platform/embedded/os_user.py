"""Who owns the embedded Postgres when root starts it, and where that user can read and write.

Postgres refuses to run as root. An ordinary user has no use for any of this: every function here then changes
nothing.
"""

from __future__ import annotations

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
from celery_capacity.routing.errors import NoServers

__all__ = ["Owner", "folder", "give", "owner", "reachable_copy"]

#: The system user, made when it is first needed, who owns nothing but Postgres's processes and data.
USER = "celery-capacity"

#: Where its folders are when those of root are closed to it (as /root mostly is).
PLACE = Path("/var/lib/celery-capacity")

#: Seconds in which another process that is just making the user has done so.
USER_SECONDS = 10.0

#: How the user is made: by the tools of most distributions, or by busybox.
_MAKE_USER = (
    ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent", USER],
    ["adduser", "-S", "-D", "-H", "-h", "/nonexistent", USER],
)


def owner() -> Owner | None:
    """The user for Postgres: None (the caller's own) unless the caller is root. Raises NoServers if none can
    be made."""
    if os.geteuid() != 0:
        return None
    end = time.monotonic() + USER_SECONDS
    said = "neither useradd nor adduser is there"
    while (found := _user()) is None:
        for command in _MAKE_USER:
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
            except FileNotFoundError:
                continue
            # It may also fail because another process makes the same user at this moment: then it is there
            # soon.
            said = done.stderr.strip() or said
            break
        if _user() is None and time.monotonic() > end:
            raise NoServers(
                f"Postgres does not run as root, and the user {USER!r} cannot be made ({said})",
                advice="Start this as an ordinary user, or set REDIS_URL and DATABASE_URL.",
            )
    return Owner(USER, found.pw_uid, found.pw_gid)


def _user() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        return None


def folder(wanted: Path, user: Owner | None, *, lasting: bool) -> Path:
    """The folder `wanted`, made and given to the user; resolved.

    Where the user cannot reach it, it becomes a link to a folder of another place: under /var/lib for data
    that are to last, else under the system's folder for temporary files.
    """
    if not wanted.exists():
        wanted.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if user is None or _open_to_all(wanted.parent.resolve()):
            wanted.mkdir(mode=0o700)
        else:
            place = PLACE if lasting else Path(tempfile.gettempdir()).resolve()
            place.mkdir(parents=True, exist_ok=True, mode=0o755)
            # A link of an earlier time whose target is gone is of no use.
            wanted.unlink(missing_ok=True)
            wanted.symlink_to(tempfile.mkdtemp(prefix="postgres-", dir=place))
    wanted = wanted.resolve()
    give(wanted, user)
    return wanted


def give(path: Path, user: Owner | None) -> None:
    if user is not None:
        os.chown(path, user.uid, user.gid)


def reachable_copy(package: Path, user: Owner | None) -> Path:
    """The installed package with Postgres's programs, or, where the user cannot run them from there, a copy
    of it."""
    libraries = package.with_name(f"{package.name}.libs")
    if user is None or (_open_to_all(package) and _readable(package) and _readable(libraries)):
        return package
    # The name tells one installed version from another; a change in place of the same version would not be
    # noticed.
    version = int((package / "pginstall" / "bin" / "postgres").stat().st_mtime)
    copy = PLACE / f"programs-{version}"
    if not copy.exists():
        PLACE.mkdir(parents=True, exist_ok=True, mode=0o755)
        fresh = Path(tempfile.mkdtemp(prefix="programs.new-", dir=PLACE))
        for source in (package, libraries):
            if source.exists():
                shutil.copytree(source, fresh / source.name, ignore=shutil.ignore_patterns("__pycache__", "include"))
        for path in (fresh, *fresh.rglob("*")):
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
        try:
            fresh.rename(copy)
        except OSError:
            # Another process was faster; its copy is as good.
            shutil.rmtree(fresh)
    return copy / package.name


def _open_to_all(path: Path) -> bool:
    """Whether everybody may pass through the folder and those above it."""
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in (path, *path.parents))


def _readable(path: Path) -> bool:
    """Whether everybody may read all files in it; True where there is none."""
    if not path.exists():
        return True
    needed: Iterable[bool] = (
        bool(found.st_mode & stat.S_IROTH) and (not stat.S_ISDIR(found.st_mode) or bool(found.st_mode & stat.S_IXOTH))
        for found in (entry.lstat() for entry in path.rglob("*"))
    )
    return all(needed)
