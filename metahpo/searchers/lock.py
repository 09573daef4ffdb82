"""A file that one process at a time can hold."""

from __future__ import annotations

import fcntl
import os
import socket
import time
import weakref
from io import FileIO
from pathlib import Path
from types import TracebackType

from metahpo.errors import SearchError

_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _let_go() -> None:
    # A fork, such as a loader of data, would hold on to it after its parent's death.
    for lock in _held:
        if lock._file is not None:
            lock._file.close()
            lock._file = None


os.register_at_fork(after_in_child=_let_go)


class FileLock:
    """Held from ``acquire`` to ``release`` or to the end of the process, however that ends.

    what: what is locked, for the error's message. Raises SearchError if another process holds it still after
    ``timeout`` seconds.
    """

    def __init__(self, path: Path, what: str, timeout: float = 0.0):
        self.path, self.what, self.timeout = path, what, timeout
        self._file: FileIO | None = None

    def acquire(self) -> None:
        deadline = time.monotonic() + self.timeout
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while holder := self._try():
                if time.monotonic() >= deadline:
                    raise SearchError(f"{self.what} is in use by {holder}; wait until it has ended, or stop it")
                time.sleep(0.02)
        except OSError as error:
            raise SearchError(f"{self.what} cannot be locked: {error}") from None
        _held.add(self)

    def _try(self) -> str | None:
        """Takes the lock, or says who has it."""
        file = FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file meanwhile: then this is no longer the one that others find.
            if os.fstat(file.fileno()).st_ino != os.stat(self.path).st_ino:
                raise FileNotFoundError
        except BlockingIOError:
            with file:
                return file.readall().decode(errors="replace") or "another process"
        except FileNotFoundError:
            file.close()
            return "another process"
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._file = file
        return None

    def release(self) -> None:
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()
