"""A file that one process at a time can hold."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from metahpo.errors import SearchError


class FileLock:
    """Held from ``acquire`` to ``release`` or to the end of the process, however that ends.

    what: what is locked, for the error's message. Raises SearchError if another process holds it still after
    ``timeout`` seconds.
    """

    def __init__(self, path: Path, what: str, timeout: float = 0.0):
        self.path, self.what, self.timeout = path, what, timeout
        self._file: int | None = None

    def acquire(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + self.timeout
        while not self._try():
            if time.monotonic() >= deadline:
                holder = self.path.read_text(errors="replace").strip() or "another process"
                raise SearchError(f"{self.what} is in use by {holder}; wait until it has ended, or stop it")
            time.sleep(0.02)

    def _try(self) -> bool:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file meanwhile: then this is no longer the one that others find.
            if os.fstat(file).st_ino != os.stat(self.path).st_ino:
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError):
            os.close(file)
            return False
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()
