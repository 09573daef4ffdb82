"""Files that one process at a time can hold: of a run directory, of a study, of a trial."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType

from metahpo.errors import CheckpointError, MetaHPOError, SearchError
from metahpo.runs.files import shown

# What a file system says that has no locks, such as NFS without its lock daemon.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
RUN_LOCK = "run.lock"

_held: weakref.WeakSet[FileLock] = weakref.WeakSet()
# The run directories that this process holds: the thread, and how often it has asked.
_runs: dict[Path, tuple[int, int]] = {}


def _let_go() -> None:
    # A fork, such as a loader of data, would hold on to it after its parent's death.
    for lock in _held:
        if lock._file is not None:
            lock._file.close()
            lock._file = None


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def holding_run(run_dir: str | Path) -> Iterator[None]:
    """Inside it this process alone may write in ``run_dir``, which is made if it is not there.

    The same thread may enter it again. A lock that a dead process has left is taken over.

    Raises:
        CheckpointError: Another process, or another thread, holds the run directory.
    """
    path = Path(os.path.realpath(run_dir))
    what, thread = f"run directory {shown(run_dir)}", threading.get_ident()
    holder, depth = _runs.get(path, (thread, 0))
    if holder != thread:
        raise CheckpointError(f"{what} is in use by another thread of this process; wait until it has ended")
    lock = FileLock(path / RUN_LOCK, what, error=CheckpointError) if not depth else None
    if lock:
        lock.acquire()
    _runs[path] = (thread, depth + 1)
    try:
        yield
    finally:
        if depth:
            _runs[path] = (thread, depth)
        else:
            del _runs[path]
        if lock:
            lock.release()


class FileLock:
    """Held from ``acquire`` to ``release`` or to the end of the process, however that ends.

    Args:
        path: The file, which is there while the lock is held.
        what: What is locked, for the error's message.
        timeout: For how many seconds to try.
        error: What is raised if another process holds it still after that.
    """

    def __init__(self, path: Path, what: str, timeout: float = 0.0, error: type[MetaHPOError] = SearchError):
        self.path, self.what, self.timeout, self.error = path, what, timeout, error
        self._file: FileIO | None = None

    def acquire(self) -> None:
        deadline = time.monotonic() + self.timeout
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while holder := self._try():
                if time.monotonic() >= deadline:
                    raise self.error(f"{self.what} is in use by {holder}; wait until it has ended, or stop it")
                time.sleep(0.02)
        except OSError as error:
            raise self.error(f"{self.what} cannot be locked: {error.strerror or error}") from None
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
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            print(f"{self.what}: its file system has no locks; see that no other process uses it", file=sys.stderr)
        # On a full disk the lock holds all the same, without its holder's name.
        with suppress(OSError):
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
