"""Lock file of a worker: proof for its successor that it is dead, where no pid tells.

A container that is started again numbers its processes anew, so its worker cannot look for the pid of its predecessor.
But the kernel is the same, and so is a folder that outlives the container. Each incarnation of a worker keeps a file
there locked, by the name of the incarnation. The kernel gives the lock up when the last process that has the file open
ends, however it ends. A successor that can lock the file knows that its predecessor is over.

The proof holds only if the lock that it tries is the very lock of the predecessor. So all of these must be certain:

- the kernel is the one that the predecessor ran on: the random id of its boot is equal;
- the file is the one that the predecessor locked, and no copy of it: the file holds its own device and inode;
- this kernel alone knows of the lock: the file system is local, and is named in `LOCAL`;
- the file never has its name without being locked: it gets the name when it is locked.

Otherwise nothing is proved, and the successor waits for the end of the lease. A second worker with a copied environment
finds the file locked.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from celery_capacity.routing.lasting_warning import LastingWarning
from celery_capacity.routing.store.worker_rows import WorkerRow

logger = logging.getLogger(__name__)

SUFFIX: Final = ".lock"
#: File systems whose locks belong to one kernel, and whose files keep device and inode while a container restarts.
LOCAL: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs"})
#: The mounts of this process: the mount point is the fifth field, the kind of file system the first behind " - ".
MOUNTS: Final = Path("/proc/self/mountinfo")
#: The kernel's form of a space, and the like, in the name of a mount.
_ESCAPED: Final = re.compile(rb"\\([0-3][0-7]{2})")
#: Seconds after which the file of a dead worker is removed. No lease is so long.
KEPT: Final = 86_400.0
#: Most bytes of a lock file.
MAX_BYTES: Final = 200


class LockFile:
    """Lock file of one incarnation of a worker. `boot`: the boot and the namespaces of its process."""

    def __init__(self, folder: Path | None, incarnation: str, boot: str) -> None:
        self._folder = folder
        self._incarnation = incarnation
        self._boot = boot
        #: The locked file, open for as long as this process and its forks run.
        self._descriptor: int | None = None
        #: A worker tries again and again while a store is away.
        self._warning = LastingWarning(logger)

    def hold(self) -> None:
        """Lock this incarnation's file. Where that fails it is logged, and a successor has to wait."""
        if self._folder is None or self._descriptor is not None:
            return
        made, descriptor = self._folder / f".{self._incarnation}", None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not is_local(self._folder):
                self._warning.warn(
                    f"PLATFORM_LOCK_DIR={self._folder} proves nothing, since other machines may use that file system: a"
                    " worker that is started again waits for the end of its former lease"
                )
                return
            descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(descriptor, _seal(descriptor, _kernel(self._boot)))
            made.rename(self._path(self._incarnation))
        except OSError as error:
            with suppress(OSError):
                made.unlink(missing_ok=True)
            if descriptor is not None:
                os.close(descriptor)
            self._warning.warn(
                f"PLATFORM_LOCK_DIR={self._folder} cannot be used: {error}: a worker that is started again waits for"
                " the end of its former lease"
            )
            return
        self._descriptor = descriptor
        self._warning.over()
        self._clean()

    def proves_end(self, row: WorkerRow) -> bool:
        """Return True only if another incarnation is certainly over."""
        if self._folder is None:
            return False
        kernel = _kernel(self._boot)
        if not kernel or _kernel(row.pid_space.boot) != kernel or not is_local(self._folder):
            return False
        return _is_given_up(self._path(row.incarnation), kernel)

    def remove(self) -> None:
        """Remove the file of this incarnation, which has left: nobody has to prove its end."""
        if self._descriptor is not None and self._folder is not None:
            with suppress(OSError):
                self._path(self._incarnation).unlink(missing_ok=True)

    def _path(self, incarnation: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{Path(incarnation).name}{SUFFIX}"

    def _clean(self) -> None:
        """Remove the files of workers that died long ago."""
        assert self._folder is not None
        for path in self._folder.glob(f"*{SUFFIX}"):
            with suppress(OSError):
                if path.stat().st_mtime < time.time() - KEPT and _is_given_up(path, None):
                    path.unlink()


def is_local(folder: Path) -> bool:
    """Return True only if the locks of a folder's files are certainly those of this kernel alone."""
    try:
        real, lines = folder.resolve(), MOUNTS.read_bytes().rstrip(b"\n").split(b"\n")
    except OSError:
        return False
    kind = deepest = ""
    for line in lines:
        fields, _, rest = line.partition(b" - ")
        mount = os.fsdecode(_ESCAPED.sub(_unescaped, fields.split(b" ")[4]))
        # Of two mounts at one point the later one is seen.
        if real.is_relative_to(mount) and len(mount) >= len(deepest):
            deepest, kind = mount, os.fsdecode(rest.split(b" ")[0])
    return kind in LOCAL


def _unescaped(escaped: re.Match[bytes]) -> bytes:
    return bytes((int(escaped[1], 8),))


def _is_given_up(path: Path, kernel: str | None) -> bool:
    """Return True if nobody holds the lock of a file, and the file is no copy. `kernel` None: of any boot."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if kernel is not None and os.read(descriptor, MAX_BYTES) != _seal(descriptor, kernel):
            return False
        # A shared lock: two that look at once do not take each other for the owner.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _seal(descriptor: int, kernel: str) -> bytes:
    """Return the text of a lock file: the boot, and where the file is, which no copy of it has."""
    status = os.fstat(descriptor)
    return f"{kernel} {status.st_dev} {status.st_ino}\n".encode()


def _kernel(boot: str) -> str:
    """Return the id of the kernel's boot, without the namespaces of a process."""
    return boot.partition(":")[0]
