"""Files that are whole or not there, and how they are named to the user."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metahpo.errors import DataError


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


def say_left_out(run_dir: Path, *names: str) -> None:
    """Says on stderr which of these files a run's report had to do without."""
    for name in names:
        if not (run_dir / name).exists():
            print(f"{shown(run_dir / name)} is not there: left out of the report", file=sys.stderr)


def checksum(data: bytes) -> str:
    """The start of the content's SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object with a checksum of its content in it, which ``read_json`` compares."""
    whole = {**content, "checksum": _sum(content)}
    write_atomically(path, json.dumps(whole, indent=2).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object that a file holds, without its checksum; None if there is no file.

    A file without a checksum, as older versions wrote, is taken as it is.

    Raises:
        DataError: It is no JSON object, or is not as it was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: expected an object, found {type(content).__name__}")
    written = content.pop("checksum", None)
    if written not in (None, _sum(content)):
        raise DataError(f"{path} is damaged: its checksum is not {_sum(content)}, its content's")
    return content


def _sum(content: Mapping[str, Any]) -> str:
    return checksum(json.dumps(content, sort_keys=True).encode())


def shown(path: str | Path) -> str:
    """The path as a user would type it: relative if it lies in the working directory."""
    try:
        inside = Path(path).relative_to(Path.cwd())
    except (ValueError, OSError):
        return str(path)
    return str(inside)


def with_short_paths(text: str) -> str:
    """The text with the paths in the working directory as a user would type them."""
    try:
        return text.replace(f"{Path.cwd()}{os.sep}", "")
    except OSError:  # It has been removed.
        return text
