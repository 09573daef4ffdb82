"""The report of a tuning: one markdown page and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from metahpo.errors import DataError, one_line
from metahpo.picture import Picture
from metahpo.report.page import config_block, versions_table
from metahpo.report.pictures import save_picture, write_page
from metahpo.runs.files import read_json
from metahpo.training.metrics import CsvLog, Row


def write_tuning_report(run_dir: str | Path, result: Any, title: str) -> Path:
    """Writes RUN_DIR/report/report.md with its pictures beside it, from the run's files; returns the page's path.

    result: what the tuning found (``metahpo.tuning.Result``). Raises DataError, which names the file, if metrics.csv is
    missing or empty, or a JSON file is damaged.
    """
    run_dir = Path(run_dir)
    history = CsvLog(run_dir / "metrics.csv").read()
    if not history:
        raise DataError(f"{run_dir / 'metrics.csv'}: found no row; a report needs a run with at least one outer step")
    folder = run_dir / "report"
    folder.mkdir(exist_ok=True)
    pictures = _pictures(result, history, folder)
    test, found = read_json(run_dir / "test.json"), read_json(run_dir / "versions.json")
    warnings = list(getattr(result, "warnings", ()))
    parts = [
        f"# {title[0].upper()}{title[1:]}: run {run_dir.resolve().name}",
        _test_table(test) if test else "",
        "\n".join(["## Warnings", "", *(f"- {line}" for line in warnings)]) if warnings else "",
        f"## Found\n\n{result.table()}",
        *pictures,
        config_block(run_dir / "config.yaml"),
        versions_table(found) if found else "",
    ]
    return write_page(folder / "report.md", parts)


def _pictures(result: Any, history: Sequence[Row], folder: Path) -> list[str]:
    """Draws the result's own pictures, and the progress where none of them shows it."""
    try:
        draw: dict[str, Callable[[], Figure]] = {
            name: lambda figure=figure: figure for name, figure in result.pictures().items()
        }
        sentences = []
    except Exception as error:  # Of a result of one's own, too.
        draw, sentences = {}, [f"The pictures could not be drawn: {type(error).__name__}: {one_line(error)}"]
    if not {"curves", "loss"} & set(draw):
        draw["progress"] = lambda: draw_progress(history)
    pictures = [save_picture(folder / f"{name}.png", name.replace("_", " "), make) for name, make in draw.items()]
    return sentences + pictures


def draw_progress(history: Sequence[Row]) -> Figure:
    """The losses of each outer step, and the accuracies where there are any."""
    panels = {
        what: [name for name in history[0] if name.endswith(what)]
        for what in ("loss", "accuracy")
        if any(name.endswith(what) for name in history[0])
    }
    figure = Picture(figsize=(5.5 * len(panels), 3.6), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (what, names) in zip(axes, panels.items()):
        for name in names:
            axis.plot([row["iteration"] for row in history], [row[name] for row in history], ".-", label=name)
        axis.set(xlabel="outer step", ylabel=what)
        values = [row[name] for row in history for name in names]
        if what == "loss" and min(values) > 0 and max(values) > 10 * min(values):
            axis.set_yscale("log")
        axis.legend()
    return figure


def _test_table(test: Mapping[str, Any]) -> str:
    rows = test["rows"]
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [f"| on {test['examples']} test examples | {' | '.join(keys)} |", f"| --- |{' ---: |' * len(keys)}"]
    for name, row in rows.items():
        cells = [_cell(key, row[key]) if key in row else "–" for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(key: str, value: float) -> str:
    return f"{value:.1%}" if "accuracy" in key or key in ("f1", "precision", "recall") else f"{value:.4g}"
