"""The folder in shared memory where verified updates lie until they are committed.

Knows files and room; knows nothing of updates' meaning.
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from flashrl_wire.errors import TooLargeError

_MARGIN_BYTES = 1 << 20
_SUFFIX = ".staged"


class StageDir:
    """`root`/flashrl-UID-PORT, mode 0700. A crash leaves files behind; the next start on the same port removes them."""

    def __init__(self, root: Path, port: int) -> None:
        self.path = root / f"flashrl-{os.getuid()}-{port}"
        make_private(self.path)
        self._lock = _lock(self.path)
        self.clear()

    def file(self, transfer_id: str) -> Path:
        """Where a transfer's staged update lies."""
        return self.path / f"{transfer_id}{_SUFFIX}"

    def drop(self, transfer_id: str) -> None:
        """Remove a transfer's file if it is there."""
        self.file(transfer_id).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove every staged file."""
        for file in self.path.glob(f"*{_SUFFIX}"):
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder, unless somebody has put something else into it."""
        self.clear()
        with suppress(OSError):
            self.path.rmdir()
        os.close(self._lock)

    def check_room(self, num_bytes: int) -> None:
        """TooLargeError unless `num_bytes` fit the file system now."""
        try:
            make_private(self.path)  # those who clean up temporary files may have removed it
            status = os.statvfs(self.path)
        except (ValueError, OSError) as error:
            raise TooLargeError(f"nothing can be staged: {error}") from error
        free_bytes = status.f_bavail * status.f_frsize
        if num_bytes + _MARGIN_BYTES > free_bytes:
            raise TooLargeError(
                f"staging needs {_mib(num_bytes)} in {self.path.parent}, {_mib(free_bytes)} are free "
                "(in a container, raise its shared memory size)",
                needed_bytes=num_bytes,
                free_bytes=free_bytes,
            )


def make_private(path: Path) -> None:
    """Make the folder if it is not there; ValueError where it cannot be, or is not ours alone."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ValueError(f"stage_root: cannot make {path}: {error.strerror}") from error
    status = path.lstat()
    if path.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        # somebody prepared the name: whoever owns the folder could swap verified weights for others
        raise ValueError(f"stage_root: {path} belongs to another user or is open to others; remove it")


def _lock(path: Path) -> int:
    """Hold the folder for as long as this process lives: of two services in it, one would clear the other's files.

    They meet where the same port is free twice: on two addresses, or in containers that share their memory.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ValueError(f"stage_root: another service stages in {path}; give one of them another port") from error
    return descriptor


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.0f} MiB"
