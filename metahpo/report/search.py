"""The report of a search: one markdown page and its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from metahpo import yaml_text
from metahpo.errors import DataError, one_line
from metahpo.report.page import cell, config_block, duration, versions_table
from metahpo.report.pictures import save_picture, write_page
from metahpo.report.search_figures import (
    Words,
    draw_front,
    draw_history,
    draw_importance,
    draw_parallel,
    draw_rungs,
    draw_slices,
    front,
    history,
    importance,
    parallel,
    rungs,
    slices,
)
from metahpo.report.search_figures.looks import budget_of, counted, is_multi_fidelity
from metahpo.report.search_figures.rungs import rungs_table
from metahpo.report.search_figures.ticks import text
from metahpo.runs.files import read_json, shown
from metahpo.searchers.base import Proposal
from metahpo.searchers.records import TrialRecord
from metahpo.searchers.store import sqlite_path
from metahpo.searchers.study import Study

BEST_TRIALS, MOST_FAILURES = 10, 20
# Below each picture.
ABOUT = {
    "history": "Each point is a trial.",
    "parallel": (
        "Each line is a trial, of those that went on from one another the last; a gap is a setting that does not exist "
        "there."
    ),
    "slices": "Trials that are still at work are left out.",
    "importance": (
        "By functional ANOVA over random forests (Hutter, Hoos and Leyton-Brown 2014), of each setting alone, without "
        "interactions; trials are drawn again and again with replacement. The fewer there are, and the less a searcher "
        "strays from the best, the less the shares can be trusted."
    ),
    "rungs": "Each line is a trial with those it went on from: what they reported or, without reports, their scores.",
    "front": "",
}
TITLES = {
    "history": "Optimisation history",
    "front": "Pareto front",
    "rungs": "Rung survival",
    "parallel": "Parallel coordinates",
    "slices": "Slices",
    "importance": "Importance",
}


def write_search_report(run_dir: str | Path, study: Study | None = None) -> Path:
    """Writes RUN_DIR/report/report.md with its pictures beside it; returns the page's path.

    study: the search; None opens RUN_DIR/study.db, or the ``search.storage`` that RUN_DIR/config.yaml names. The search
    may still be at work. A picture that the study has nothing for is left out, with a sentence that says why.

    Raises SearchError if there is no study, DataError if it has no trial or a file of the run is damaged.
    """
    run_dir = Path(run_dir)
    config = _config(run_dir / "config.yaml")
    with _opened(run_dir, config, study) as shown:
        if not shown.trials:
            raise DataError(f"{run_dir}: the study has no trial yet; a report needs at least one")
        words = _words(shown, config)
        folder = run_dir / "report"
        folder.mkdir(parents=True, exist_ok=True)
        pictures = _pictures(shown, words, folder)
        versions = read_json(run_dir / "versions.json")
        parts = [
            f"# Search {run_dir.resolve().name}",
            _summary(shown, words),
            _best(shown, words),
            _best_trials(shown, words),
            *pictures,
            _failures(shown),
            config_block(run_dir / "config.yaml"),
            _dashboard(run_dir, config),
            versions_table(versions) if versions else "",
        ]
    return write_page(folder / "report.md", parts)


# What the run directory holds.


def _config(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a run's config, as it was written; empty where there is none."""
    if not path.exists():
        return {}
    try:
        tree = yaml_text.read(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(tree, Mapping):
        return {}
    return {name: dict(section) for name, section in tree.items() if isinstance(section, Mapping)}


def _storage(run_dir: Path, config: Mapping[str, Mapping[str, Any]]) -> str | Path:
    return config.get("search", {}).get("storage") or run_dir / "study.db"


@contextmanager
def _opened(run_dir: Path, config: Mapping[str, Mapping[str, Any]], study: Study | None) -> Iterator[Study]:
    if study is not None:
        yield study
        return
    with Study.open(_storage(run_dir, config), name=config.get("search", {}).get("name", "study")) as found:
        yield found


def _words(study: Study, config: Mapping[str, Mapping[str, Any]]) -> Words:
    """A training names its objectives and its fidelity; a function of one's own does not."""
    count, objective = len(study.directions), config.get("objective", {})
    names = objective.get("objectives")
    if not isinstance(names, (list, tuple)) or len(names) != count:
        names = ["score"] if count == 1 else [f"score {i + 1}" for i in range(count)]
    return Words(tuple(map(str, names)), tuple(study.directions), str(objective.get("fidelity", "budget")))


# Pictures.


def _pictures(study: Study, words: Words, folder: Path) -> list[str]:
    """Draws those that there is something for; gives the page's sections."""
    draw: dict[str, Callable[[], Figure | None]] = dict.fromkeys(TITLES, lambda: None)
    why_none = ""
    levels = rungs(study) if is_multi_fidelity(study.trials) else None

    def draw_shares() -> Figure | None:
        nonlocal why_none
        found = importance(study)
        why_none = found if isinstance(found, str) else ""
        return None if isinstance(found, str) else draw_importance(found, words)

    if any(r.state == "complete" for r in study.trials):
        draw |= {
            "history": lambda: draw_history(history(study), words),
            "front": lambda: draw_front(front(study), words) if len(study.directions) > 1 else None,
            "parallel": lambda: draw_parallel(parallel(study), words),
            "slices": lambda: draw_slices(slices(study), words),
            "importance": draw_shares,
        }
    if levels and any(len(curve.steps) for curve in levels.curves):
        draw["rungs"] = lambda: draw_rungs(levels, words)
    sections = []
    for name, make in draw.items():
        picture = save_picture(folder / f"{name}.png", TITLES[name].lower(), make)
        body = [
            picture,
            rungs_table(levels, words) if levels and name == "rungs" else "",
            ABOUT[name] if picture.startswith("![") else why_none if name == "importance" else "",
        ]
        if any(body):
            sections.append("\n\n".join([f"## {TITLES[name]}", *(part for part in body if part)]))
    return sections


# The parts of the page.


def _summary(study: Study, words: Words) -> str:
    records = study.trials
    counts = {state: sum(r.state == state for r in records) for state in ("complete", "failed", "running")}
    running = f", {counts['running']} at work" if counts["running"] else ""
    seconds = sum(r.seconds or 0.0 for r in records)
    lines = [
        f"{counted(len(records), 'trial')}: {counts['complete']} complete, {counts['failed']} failed{running}. "
        f"They took {duration(seconds)} of work in all."
    ]
    if is_multi_fidelity(records):
        used = sum(study.duration(Proposal(r.settings, r.budget, r.parent)) for r in records)
        lines.append(f"Budget used: {used:g}{'' if words.unit == 'budget' else f' {words.unit}'}.")
    if len(study.directions) > 1:
        lines.append(f"Objectives: {', '.join(words.axis(i) for i in range(len(study.directions)))}.")
        lines.append("Where one of them is shown it is the first.")
    return " ".join(lines)


def _best(study: Study, words: Words) -> str:
    best = study.best
    if best is None:
        return "No trial is complete, so there is no best one."
    at = "" if best.budget is None else f" at {words.budget(best.budget)}"
    lines = ["| setting | value |", "| --- | --- |"]
    lines += [f"| `{cell(name)}` | {cell(str(value))} |" for name, value in best.settings.items()]
    heading = f"## Best: trial {best.number}, {words.objectives[0]} {_score(best.score)}{at}"
    return "\n".join([heading, "", f"By {words.axis()}.", "", *lines])


def _best_trials(study: Study, words: Words) -> str:
    sign = -1 if words.higher() else 1
    several = len(study.directions) > 1
    first = study.front if several else []
    rest = [r for r in study.trials if r.state == "complete" and r not in first]
    rest.sort(key=lambda r: (-budget_of(r), sign * (r.score or 0.0), r.number))
    shown = [*first, *rest][:BEST_TRIALS]
    if not shown:
        return ""
    budgets = is_multi_fidelity(study.trials)
    names = [name for name in study.space if any(name in r.settings for r in shown)]
    heads = ["trial", *words.objectives, *(["budget"] if budgets else []), "seconds", *(f"`{n}`" for n in names)]
    lines = [f"| {' | '.join(map(cell, heads))} |", "|" + " ---: |" * (len(heads) - len(names)) + " --- |" * len(names)]
    for r in shown:
        numbers = [str(r.number), *map(_score, r.scores or ())]
        numbers += [f"{r.budget:g}" if r.budget is not None else "full"] if budgets else []
        numbers.append("–" if r.seconds is None else f"{r.seconds:.3g}")
        values = [text(r.settings[name]) if name in r.settings else "–" for name in names]
        lines.append(f"| {' | '.join(map(cell, [*numbers, *values]))} |")
    order = "those of the front first" if several else "of the largest budget first" if budgets else "best first"
    return "\n".join([f"## Best trials ({order})", "", *lines])


def _failures(study: Study) -> str:
    failed = [r for r in study.trials if r.state == "failed"]
    if not failed:
        return ""
    reasons: dict[str, list[int]] = {}
    for record in failed:
        reasons.setdefault(_reason(record), []).append(record.number)
    lines = []
    for reason, numbers in list(reasons.items())[:MOST_FAILURES]:
        more = f" and {len(numbers) - MOST_FAILURES} more" if len(numbers) > MOST_FAILURES else ""
        listed = ", ".join(map(str, numbers[:MOST_FAILURES]))
        lines.append(f"- trial{'s' if len(numbers) > 1 else ''} {listed}{more}: {reason}")
    if len(reasons) > MOST_FAILURES:
        lines.append(f"- and {len(reasons) - MOST_FAILURES} other reasons; the study keeps the tracebacks")
    return "\n".join(["## Failures", "", *lines])


def _reason(record: TrialRecord) -> str:
    """What a failed trial's error says, in one line: of a traceback what comes after its last frame."""
    lines = (record.error or "").strip().splitlines()
    frames = [i for i, line in enumerate(lines) if line.startswith("  ")]
    last = next((i for i in reversed(frames) if lines[i].startswith('  File "')), None)
    if last is not None:
        lines = lines[next((i for i in range(last, len(lines)) if i not in frames), last) :]
    said = one_line(" ".join(lines)).replace("`", "'")
    return f"`{said}`" if said else "no reason kept"


def _dashboard(run_dir: Path, config: Mapping[str, Mapping[str, Any]]) -> str:
    path = sqlite_path(_storage(run_dir, config))
    url = f"sqlite:///{shown(path)}" if path else "the study's database URL"
    return f"Optuna's dashboard opens the study too: `pip install optuna-dashboard`, then `optuna-dashboard {url}`."


def _score(score: float | None) -> str:
    return "–" if score is None or math.isnan(score) else f"{score:.5g}"
