"""Commands of metahpo run in this process, and how their ends are judged."""

from __future__ import annotations

import io
import json
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

from metahpo import cli
from metahpo.errors import SearchError
from metahpo.searchers import Study

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
Outcome = tuple[str, str]


@dataclass(frozen=True)
class Case:
    """A fault: play makes it in the folder given, and says how it ended and why."""

    kind: str
    name: str
    play: Callable[[Path], Outcome]


@dataclass(frozen=True)
class Run:
    """A kind of run: how it is begun, stopped half-way and used; folder: holds whole/run and half/run.

    A search is stopped by a fault in place of arguments: see ``search_runs``. last: the file that is written last but
    for the report.
    """

    name: str
    command: list[str]
    config: list[str]
    half: list[str]
    folder: Path = Path()
    lock: str = "run.lock"
    last: str = "test.json"

    def at(self, folder: Path) -> Run:
        return replace(self, folder=folder)

    @property
    def whole(self) -> Path:
        return self.folder / "whole" / "run"

    @property
    def uses(self) -> list[tuple[str, list[str], Path]]:
        """(name, arguments before the run directory, the run to copy) of each command that reads a run."""
        half = self.folder / "half" / "run"
        resume = [*self.command, "--resume"]
        if self.name == "search":
            ended = self.folder / "ended" / "run"
            report = ("report", ["report"], self.whole)
            return [("resume", resume, half), ("resume with a result", resume, ended), report]
        if self.name != "training":
            return [("resume", resume, half)]
        others = [(name, [name], self.whole) for name in ("evaluate", "report")]
        return [("resume", resume, half), *others]


TRAINING = Run(
    "training",
    ["train"],
    [
        str(CONFIGS / "sinusoid_10shot" / "maml.yaml"),
        *("net.hidden=[8]", "data.eval_queries=10", "learner.steps=1", "training.epochs=2"),
        *("training.iterations=3", "training.tasks=2", "training.val_tasks=3"),
        *("training.test_tasks=3", "training.keep_best=2", "training.engine=loop"),
        *("training.device=cpu", "training.threads=1", "training.check_gradient=false"),
    ],
    ["--until-epoch", "1"],
)
RATES = Run(
    "tuning",
    ["tune", "rates"],
    [
        str(CONFIGS / "digits" / "rates.yaml"),
        *("data.train=60", "data.val=20", "data.test=20", "net.width=8", "net.blocks=1"),
        *("tune.steps=4", "tune.batch=10", "tune.iterations=2", "device=cpu"),
    ],
    ["--until", "1"],
)
SEARCH = Run(
    "search",
    ["search"],
    [
        str(CONFIGS / "glyphs_5way_1shot" / "search" / "successive_halving.yaml"),
        f"run={CONFIGS / 'sinusoid_10shot' / 'maml.yaml'}",
        "space={learner.inner_lr: {float: [0.001, 0.1], log: true}}",
        "searcher={name: successive_halving, max_budget: 2, eta: 2}",
        "objective={name: training, objectives: [loss]}",
        "search={trials: 3}",
        *("run.net.hidden=[8]", "run.data.eval_queries=10", "run.learner.steps=1", "run.training.epochs=2"),
        *("run.training.iterations=3", "run.training.tasks=2", "run.training.val_tasks=3"),
        *("run.training.test_tasks=3", "run.training.keep_best=2", "run.training.engine=loop"),
        *("run.training.device=cpu", "run.training.threads=1", "run.training.check_gradient=false"),
    ],
    [],
    lock="study.db.lock",
    last="best.yaml",
)


def run(arguments: list[str]) -> tuple[int, str, str]:
    """A command's exit status, stdout and stderr; an exception that it lets out is a traceback on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main(arguments)
        except BaseException:
            traceback.print_exc()
            code = 1
    return code, out.getvalue(), err.getvalue()


@contextmanager
def lasting(source: Path, folder: Path) -> Iterator[Path]:
    """A copy of a run directory, under the same name."""
    run_dir = folder / "run"
    shutil.copytree(source, run_dir)
    yield run_dir


def judged(kind: Run, run_dir: Path, arguments: list[str], damaged: str = "") -> Outcome:
    """How a command ends in ``run_dir``; damaged: the name of the file that is."""
    code, _, err = run([*arguments, str(run_dir)])
    if code:
        return refusal(code, err, run_dir)
    if "Traceback" in err:
        return "fell short", "a traceback and exit status 0"
    which = {"report": ["report/report.md"], "evaluate": ["test.json", "tests"]}.get(arguments[0])
    damaged = damaged.rpartition("/")[2]
    other = differences(kind, run_dir, which)
    if not other:
        return "held", ""
    # The name of a checkpoint that is gone is known but for its checksum.
    said = bool(damaged) and damaged.removesuffix(".json").split(".")[0] in err
    return "said" if said else "fell short", f"exit status 0, others than undisturbed: {', '.join(other)}"


def refusal(code: int, err: str, run_dir: Path) -> Outcome:
    """Held if one line, or one for each edited key, names a file or a key, and there is no other but of warnings."""
    lines = err.splitlines()
    refusals = [line for line in lines if line.startswith("metahpo: ")]
    if "Traceback" in err:
        return "fell short", f"a traceback: {lines[-1]:.150}"
    keys = [line for line in refusals if re.match(r"metahpo: [\w.]+: config\.yaml says", line)]
    if len(refusals) != 1 and (not refusals or keys != refusals):
        return "fell short", f"exit status {code} and {len(refusals)} lines: {' / '.join(lines):.300}"
    names = run_dir.name in refusals[0] or re.search(r"\w+\.\w+|\w+:", refusals[0][len("metahpo: ") :])
    return ("held", refusals[0]) if names else ("fell short", f"names nothing: {refusals[0]}")


def differences(kind: Run, run_dir: Path, which: list[str] | None = None) -> list[str]:
    """The names of the figures that are not those of the undisturbed run, seconds aside."""
    found, expected = figures(run_dir), figures(kind.whole)
    others = [key for key in which or expected if found.get(key) != expected.get(key)]
    return [f"{key}{first_difference(found.get(key), expected.get(key))}" for key in others]


def first_difference(found: object, expected: object) -> str:
    """Of two texts, the first line of the one that the other has not, in brackets."""
    if not isinstance(found, str) or not isinstance(expected, str):
        return ""
    known = set(expected.splitlines())
    return next((f" ({line:.150})" for line in found.splitlines() if line not in known), "")


def figures(run_dir: Path) -> dict[str, object]:
    kept: dict[str, object] = {}
    checkpoints = sorted((run_dir / "checkpoints").glob("*.pt"))
    if checkpoints:
        kept["final checkpoint"] = (checkpoints[-1].name, checkpoints[-1].read_bytes())
    # Evaluate writes figures that are not those of test.json into a file beside it.
    if (run_dir / "study.db").exists():
        kept["trials"] = trials(run_dir)
    kept["tests"] = sorted(path.name for path in run_dir.glob("test*.json"))
    for name in ("test.json", "result.pt", "best.yaml", "report/report.md"):
        path = run_dir / name
        if not path.is_file():
            continue
        data: object = path.read_bytes()
        if name == "test.json":
            try:
                data = {k: v for k, v in json.loads(path.read_bytes()).items() if k != "checksum"}
            except (ValueError, AttributeError):
                data = None
        if name == "report/report.md":
            text = path.read_text(errors="replace").replace(str(run_dir), "RUN")
            # The config block tells where the run is, which differs from copy to copy.
            text = re.sub(r"run_dir: .*\n( .*\n)*", "", text)
            text = re.sub(r" (Training and validation|They) took .* in all\.", "", text)
            data = without_seconds(text)
        kept[name] = data
    return kept


def trials(run_dir: Path) -> object:
    """What a study says of its trials, the time that they took aside."""
    try:
        with Study.open(run_dir / "study.db") as study:
            names = ("number", "settings", "state", "scores", "budget", "parent", "reports")
            return [{name: getattr(trial, name) for name in names} for trial in study.trials]
    except SearchError as error:
        return str(error)


def without_seconds(page: str) -> str:
    """A report without the column ``seconds`` of its table of trials."""
    lines, column = [], None
    for line in page.splitlines():
        cells = line.split("|")
        if line.startswith("| trial |"):
            column = next((i for i, cell in enumerate(cells) if cell.strip() == "seconds"), None)
        column = column if line.startswith("|") else None
        lines.append("|".join(cell for i, cell in enumerate(cells) if i != column))
    return "\n".join(lines)
