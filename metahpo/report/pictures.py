"""Pictures beside a page, none of which can cost the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from metahpo.errors import one_line
from metahpo.picture import png
from metahpo.training.checkpoint import write_atomically


def save_picture(path: Path, title: str, draw: Callable[[], Figure | None]) -> str:
    """Writes a picture whole or not at all, or removes that of an earlier report where there is none now.

    Args:
        path: Of the PNG file.
        title: What it shows.
        draw: Makes the figure; None: there is nothing to show.

    Returns:
        What the page says in its place: the link in markdown, a sentence where drawing failed, or
        nothing where there is nothing to show.

    Raises:
        OSError: If the file cannot be written; it names the file.
    """
    try:
        figure = draw()
        content = None if figure is None else png(figure)
        failed = ""
    except Exception as error:  # What a learner's own code or a drawing library raises has no end.
        content = None
        failed = f"The picture of the {title} could not be drawn: {type(error).__name__}: {one_line(error)}".rstrip(".")
    if content is None:
        path.unlink(missing_ok=True)
        return f"{failed}." if failed else ""
    write_atomically(path, content)
    return f"![{title}]({path.name})"


def write_page(path: Path, parts: list[str]) -> Path:
    """Writes the parts that are not empty, a blank line between them, whole or not at all."""
    text = "\n\n".join(part for part in parts if part) + "\n"
    # A name may hold what UTF-8 does not.
    write_atomically(path, text.encode("utf-8", "replace"))
    return path
