"""What a search tells while it runs and leaves behind: lines, best.yaml, front.csv, a report."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from metahpo import yaml_text
from metahpo.config_file import dump_config
from metahpo.errors import one_line
from metahpo.runs.files import shown
from metahpo.searchers.records import TrialRecord
from metahpo.searchers.study import Study
from metahpo.training.checkpoint import write_atomically

if TYPE_CHECKING:
    from metahpo.search_building import Search


class SearchLog:
    """Tells of each trial of ``study``, and keeps best.yaml in ``run_dir`` up to date."""

    def __init__(self, search: Search, study: Study, run_dir: Path):
        self.search, self.study, self.run_dir = search, study, run_dir
        self._shown: int | None = None

    def begin(self, workers: int) -> None:
        settings = self.search.config.search
        ended = sum(record.state != "running" for record in self.study.trials)
        much = f"{settings.trials} trials" if settings.trials else ""
        if settings.budget is not None:
            unit = f" {self.search.training.fidelity}" if self.search.training else ""
            much += f"{' or ' if much else ''}a budget of {settings.budget:g}{unit}"
        before = f", {ended} ended before" if self.study.trials else ""
        print(
            f"{type(self.search.searcher).__name__} over {len(self.search.space)} settings, {much or 'all of them'}"
            f"{before}, {workers} worker{'s' if workers > 1 else ''}, run directory {shown(self.run_dir)}",
            flush=True,
        )
        # The search may have been killed after a trial's end and before its file.
        self._refresh()

    def trial(self, record: TrialRecord) -> None:
        """Called with each that has ended."""
        total, best = self.search.config.search.trials, self.study.best
        ended = sum(r.state != "running" for r in self.study.trials)
        parts = [f"{ended}{f'/{total}' if total else ''}  trial {record.number}", self._settings(record)]
        if record.budget is not None:
            parent = "" if record.parent is None else f" after trial {record.parent}"
            parts.append(f"budget {record.budget:g}{parent}")
        parts.append(self._scores(record) if record.scores else f"failed: {one_line(_reason(record.error), 160)}")
        if best is not None:
            parts.append(f"best {best.score:.5g} (trial {best.number})")
        parts.append(f"{record.seconds or 0.0:.0f} s")
        tqdm.write("  ".join(parts), file=sys.stdout)
        sys.stdout.flush()
        self._refresh()

    def end(self) -> None:
        """Tells what was found, and writes the report."""
        from metahpo.report.search import write_search_report

        self._refresh(anew=True)
        records = self.study.trials
        complete, failed = (sum(r.state == state for r in records) for state in ("complete", "failed"))
        print(f"{len(records)} trials: {complete} complete, {failed} failed")
        best = self.study.best
        if best is not None:
            print(f"best: trial {best.number}, {self._scores(best)}; {self._settings(best)}")
            what = f"; train it: metahpo train {shown(self.run_dir / 'best.yaml')}" if self.search.training else ""
            print(f"settings: {shown(self.run_dir / 'best.yaml')}{what}")
        if len(self.search.directions) > 1:
            where = shown(self.run_dir / "front.csv")
            print(f"front: {len(self.study.front)} trials that none other beats in all, {where}")
        if records:
            print(f"report: {shown(write_search_report(self.run_dir, self.study))}")

    def _scores(self, record: TrialRecord) -> str:
        return ", ".join(f"{name} {score:.5g}" for name, score in zip(self.search.names, record.scores or ()))

    def _settings(self, record: TrialRecord) -> str:
        """By the last part of each name, where that says which."""
        last = [name.rpartition(".")[2] for name in self.search.space]
        short = {n: s if last.count(s) == 1 else n for n, s in zip(self.search.space, last)}
        return ", ".join(f"{short[name]} {_short(value)}" for name, value in record.settings.items())

    # Files.

    def _refresh(self, anew: bool = False) -> None:
        best = self.study.best
        if best is not None and (anew or best.number != self._shown):
            write_atomically(self.run_dir / "best.yaml", self._best(best).encode())
            self._shown = best.number
        if len(self.search.directions) > 1:
            write_atomically(self.run_dir / "front.csv", self._front().encode())

    def _best(self, best: TrialRecord) -> str:
        training, of = self.search.training, len(self.study.trials)
        title = f"# Trial {best.number}, the best of {of} by {self.search.names[0]}: {best.score!r}.\n"
        if training is None:
            return title + yaml_text.dump(best.settings)
        folder = self.study.job(best.number).folder
        config = training.kept_config(folder, best.settings)
        return title + f"# {_promise(training, config, best)}\n" + dump_config(config)

    def _front(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["trial", *self.search.names, *self.search.space])
        for record in self.study.front:
            settings = [record.settings.get(name, "") for name in self.search.space]
            writer.writerow([record.number, *(record.scores or ()), *settings])
        return text.getvalue()


def _promise(training: Any, config: Any, best: TrialRecord) -> str:
    """How training with the config compares with the trial."""
    if training.folds is not None:
        return f"That is the mean over {training.folds} folds; this config trains on the split of the data itself."
    if training.seeds > 1:
        return f"That is the mean over {training.seeds} seeds; this config trains with the first of them."
    epochs, of = best.notes.get("epochs", config.training.epochs), config.training.epochs
    if epochs < of:
        only = f"metahpo train --until-epoch {epochs:g}" if float(epochs).is_integer() else "no whole number of epochs"
        return f"That is after {epochs:g} of the {of} epochs that this config trains ({only})."
    if training.fidelity == "data" and best.parent is not None:
        return "The trial began on fewer classes; this config trains on all from the start."
    return "metahpo train with this config gives the same figure exactly, with the same torch on the same machine."


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reason(error: str | None) -> str:
    """The last line of a traceback, the first of what is written to be read."""
    lines = (error or "").strip().splitlines() or [""]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]
