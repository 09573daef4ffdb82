"""Files that are whole or not there, and how they are named to the user."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash it is either as before or complete; an OSError names the file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        # A write or a sync names no file, the others the temporary one.
        raise OSError(error.errno, error.strerror or str(error), shown(path)) from error


def checksum(data: bytes) -> str:
    """The start of the content's SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def shown(path: str | Path) -> str:
    """The path as a user would type it: relative if it lies in the working directory."""
    try:
        inside = Path(path).relative_to(Path.cwd())
    except (ValueError, OSError):
        return str(path)
    return str(inside)
