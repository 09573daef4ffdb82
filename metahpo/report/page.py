"""The report of a run: one markdown page and its pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from matplotlib.figure import Figure

from metahpo.errors import DataError
from metahpo.learners.base import MetaLearner
from metahpo.report.completion import CompletionExample
from metahpo.report.curves import draw_curves, learning_curves
from metahpo.report.example import CurveExample, Example, ImageExample, draw_example, example
from metahpo.report.paths import PathsExample
from metahpo.report.pictures import save_picture, write_page
from metahpo.report.rates import Rates, draw_rates, inner_rates, rates_table
from metahpo.runs.files import read_json
from metahpo.tasks.task import Task
from metahpo.training.metrics import CsvLog, Row, best_epochs, judged_by

EXPLANATION = (
    "*Transductive*: the queries of a task are normalised together, by the batch statistics of its whole query set, as "
    "the papers of MAML and MAML++ report. *Inductive*: each query is predicted alone, from running statistics."
)
SAME = (
    "This learner predicts each query independently of the others, so transductive and inductive accuracy are the same."
)
NOT_ALONE = "There is no inductive accuracy: the learner gives no predictions of each query alone."
LOSS_CURVE = (
    " The training loss is the outer loop's own objective: with a multi-step loss, the weighted sum over the inner "
    "steps."
)
EXAMPLES = {
    CurveExample: "The predicted curve before and after adapting to the support points.",
    CompletionExample: "An image before and after adapting to the pixels given.",
    ImageExample: "Some queries of a task: the predicted class and its probability. "
    "A green frame: right after adapting.",
    PathsExample: "Paths to six goals (stars) from the start (dot). After adapting, three of them for each goal.",
}


def write_report(run_dir: str | Path, learner: MetaLearner, example_task: Task, title: str | None = None) -> Path:
    """Writes RUN_DIR/report/report.md with curves.png, rates.png and example.png beside it; returns the page's path.

    Reads metrics.csv and, where they are, test.json, config.yaml and versions.json. learner: the run's, with the
    weights to show; example_task: one task. A picture that the learner or the task has nothing for is left
    out; one that cannot be drawn becomes a sentence.

    Raises DataError, which names the file, if metrics.csv is missing, empty or damaged, or a JSON file is damaged.
    """
    run_dir = Path(run_dir)
    history = _history(run_dir / "metrics.csv")
    test, versions = read_json(run_dir / "test.json"), read_json(run_dir / "versions.json")
    rates, folder = inner_rates(learner), run_dir / "report"
    folder.mkdir(exist_ok=True)
    curves = save_picture(folder / "curves.png", "learning curves", lambda: draw_curves(learning_curves(history)))
    heat_map = save_picture(folder / "rates.png", "inner rates", lambda: draw_rates(rates) if rates else None)
    shown: list[Example] = []

    def draw() -> Figure | None:
        shown.extend(found for found in [example(learner, example_task)] if found)
        return draw_example(shown[0]) if shown else None

    picture = save_picture(folder / "example.png", "example task", draw)
    parts = [
        f"# {title or f'Run {run_dir.resolve().name}'}",
        _results(history, test, learner, run_dir / "test.json"),
        _best(history),
        f"## Learning curves\n\n{curves}\n\n"
        "Bands are 95% confidence intervals over the validation tasks."
        + ("" if judged_by(history[0]) == "return" else LOSS_CURVE),
        _rates(rates, heat_map) if rates else "",
        "\n\n".join(["## An example task", *(EXAMPLES[type(each)] for each in shown), picture]) if picture else "",
        config_block(run_dir / "config.yaml"),
        versions_table(versions) if versions else "",
    ]
    return write_page(folder / "report.md", parts)


# What the run directory holds.


def _history(path: Path) -> list[Row]:
    if not path.exists():
        raise DataError(f"{path} is missing: a report needs a run with at least one whole epoch")
    try:
        rows = CsvLog(path).read()
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not rows:
        raise DataError(f"{path} is empty: a report needs a run with at least one whole epoch")
    for number, row in enumerate(rows, start=1):
        missing = [name for name in ("epoch", "val_loss") if name not in row]
        if missing or ("val_accuracy" in row) != ("val_accuracy" in rows[0]):
            raise DataError(f"{path} is damaged: row {number} has no {missing[0] if missing else 'val_accuracy'}")
    return rows


# The parts of the page.


def _results(history: list[Row], test: dict[str, Any] | None, learner: MetaLearner, path: Path) -> str:
    if test is None:
        best = _best_row(history)
        rows = {f"best, epoch {best['epoch']:.0f}": {k.removeprefix("val_"): v for k, v in best.items()}}
        caption = "On the validation tasks; the run has not been tested."
    else:
        rows = test.get("rows")
        if not isinstance(rows, dict) or not all(isinstance(row, dict) and "loss" in row for row in rows.values()):
            raise DataError(f"{path} is damaged: expected rows by name, each with a loss")
        caption = f"Over {test.get('tasks', '?')} {test.get('split', 'test')} tasks, ± 95% confidence intervals."
        rows = {_named(name, row): row for name, row in rows.items()}
    if all("return" in row for row in rows.values()):
        heads, keys = ["policy", "return after adapting", "before adapting"], ["return", "return_before"]
        return f"{_table(heads, keys, rows, _return)}\n\n{caption} Returns are undiscounted."
    if not any("accuracy" in row for row in rows.values()):
        loss = "MSE" if learner.loss is F.mse_loss else "loss"
        table = _table(["model", f"{loss} after adapting", "before adapting"], ["loss", "loss_before"], rows, _loss)
        return f"{table}\n\n{caption}"
    heads = ["model", "accuracy, transductive", "inductive", "before adapting"]
    table = _table(heads, ["accuracy", "accuracy_inductive", "accuracy_before"], rows, _percent)
    if not any("accuracy_inductive" in row for row in rows.values()):
        return f"{table}\n\n{caption} {NOT_ALONE}"
    return f"{table}\n\n{caption} {EXPLANATION if learner.batch_dependent else SAME}"


def _named(name: str, row: Mapping[str, float]) -> str:
    return f"{name}, epoch {row['epoch']:.0f}" if "epoch" in row else name


def _table(heads: list[str], keys: list[str], rows: Mapping[str, Mapping[str, float]], form: Any) -> str:
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(keys)]
    for name, row in rows.items():
        cells = [form(row[key], row.get(f"{key}_ci", math.nan)) if key in row else "–" for key in keys]
        lines.append("| " + " | ".join([cell(name), *cells]) + " |")
    return "\n".join(lines)


def _percent(value: float, half_width: float) -> str:
    return f"{100 * value:.1f}%" + (f" ± {100 * half_width:.1f}%" if math.isfinite(half_width) else "")


def _loss(value: float, half_width: float) -> str:
    return f"{value:.4f}" + (f" ± {half_width:.4f}" if math.isfinite(half_width) else "")


def _return(value: float, half_width: float) -> str:
    return f"{value:.2f}" + (f" ± {half_width:.2f}" if math.isfinite(half_width) else "")


def _best_row(history: list[Row]) -> Row:
    best = best_epochs(history, 1)[0]
    return next(row for row in history if row["epoch"] == best)


def _best(history: list[Row]) -> str:
    row = _best_row(history)
    name = judged_by(row)
    form = {"accuracy": _percent, "return": _return, "loss": _loss}[name]
    result = form(row[f"val_{name}"], row.get(f"val_{name}_ci", math.nan))
    seconds = sum(row.get("seconds", 0.0) for row in history)
    time = f" Training and validation took {duration(seconds)} in all." if seconds else ""
    return f"Best epoch by validation: {row['epoch']:.0f} of {len(history)} ({name} {result}).{time}"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _rates(rates: Rates, heat_map: str) -> str:
    what = (
        "Learnt by the outer loop; a negative rate climbs the support loss." if rates.learnt else "Fixed, not learnt."
    )
    picture = f"{heat_map}\n\n" if heat_map else ""
    return f"## Inner rates\n\n{what}\n\n{picture}{rates_table(rates)}"


def config_block(path: Path) -> str:
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
    # A fence longer than any in the text, so that nothing in it can end the block.
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"## Config\n\n{fence}yaml\n{text}\n{fence}"


def versions_table(versions: Mapping[str, Any]) -> str:
    lines = [f"| {cell(str(name))} | {cell(str(value))} |" for name, value in versions.items()]
    return "\n".join(["## Versions", "", "| | |", "| --- | --- |", *lines])


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
