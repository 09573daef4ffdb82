"""Tables of image files and their labels."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from metahpo.errors import DataError

COLUMNS = ["filename", "label"]


def read_table(path: Path) -> Iterator[tuple[str, str, str]]:
    """(place for messages, file name, label) of each row of a CSV file with the header "filename,label".

    Raises DataError, naming the file and row, if there is no such file or row, or a row is another than that.
    """
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}), expected a table of filename,label") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: is not a CSV table ({error}), expected filename,label") from None
    if not rows or [cell.strip() for cell in rows[0]] != COLUMNS:
        found = ",".join(rows[0]) if rows else ""
        raise DataError(f"{path}, row 1: found {found[:60]!r}, expected the header 'filename,label'")
    if len(rows) == 1:
        raise DataError(f"{path}: has no row but its header, expected a row an image")
    for number, row in enumerate(rows[1:], start=2):
        cells = [cell.strip() for cell in row]
        if len(cells) != 2 or not all(cells):
            raise DataError(f"{path}, row {number}: found {','.join(row)[:60]!r}, expected filename,label")
        yield f"{path}, row {number}", cells[0], cells[1]
