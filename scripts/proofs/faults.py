"""A campaign of faults: damaged and edited files, two commands in one directory, signals, a full disk.

    python scripts/proofs/faults.py                # all, on a training, a tuning and a search
    python scripts/proofs/faults.py --quick        # a sample

A case is held if the command ends with 0 and the figures of the undisturbed run, or with one line
on stderr that names a file or a key. It is said if the figures are others and stderr names the
damaged file. It fell short otherwise; then the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from metahpo.searchers import Study

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from proofs import contents, processes
from proofs.commands import RATES, SEARCH, TRAINING, Case, Run, judged, lasting, run

EDITS = {
    "training": [
        ("lr: 0.001", "lr: 0.01"),
        ("seed: 0", "seed: 1"),
        ("inner_lr: 0.01", "inner_lr: 0.02"),
        ("shots: 10", "shots: 5"),
        ("- 8\n", "- 9\n"),
        ("keep_best: 2", "keep_best: 1"),
        ("epochs: 2", "epochs: two"),
        ("epochs: 2", "epochz: 2"),
        ("training:", "training: ["),
    ],
    "search": [
        ("- 0.001", "- 0.002"),
        ("eta: 2", "eta: 3"),
        ("seed: 0", "seed: 1"),
        ("- loss", "- seconds"),
        ("shots: 10", "shots: 5"),
        ("- 8\n", "- 9\n"),
        ("lr: 0.001", "lr: 0.01"),
        ("epochs: 2", "epochs: two"),
        ("trials: 3", "trails: 3"),
        ("space:", "space: ["),
    ],
    "tuning": [
        ("lr: 0.05", "lr: 0.06"),
        ("batch: 10", "batch: 11"),
        ("width: 8", "width: 9"),
        ("train: 60", "train: 61"),
        ("momentum: 0.9", "momentum: 2"),
    ],
}
DAMAGES = {
    "one bit flipped": lambda data: data[: len(data) // 2]
    + bytes(byte ^ 4 for byte in data[len(data) // 2 :][:1])
    + data[len(data) // 2 + 1 :],
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "deleted": None,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a sample of the cases")
    parser.add_argument("--only", help="the cases whose kind or name holds this")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "metahpo.building", "metahpo.report"])
    rows = []
    with tempfile.TemporaryDirectory(prefix="metahpo-faults-") as folder:
        kinds = [TRAINING] if options.quick else [TRAINING, RATES, SEARCH]
        cases = [case for kind in kinds for case in cases_of(prepared(Path(folder), kind))]
        cases = [case for case in cases if not options.only or options.only in f"{case.kind}, {case.name}"]
        for case in cases[:: len(cases) // 12] if options.quick else cases:
            shutil.rmtree(Path(folder) / "case", ignore_errors=True)
            outcome, why = case.play(Path(folder) / "case")
            rows.append({"kind": case.kind, "name": case.name, "outcome": outcome, "why": why})
            if outcome in ("fell short", "said"):
                print(f"{outcome}: {case.kind}, {case.name}: {why}", flush=True)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2))
    return 1 if any(row["outcome"] == "fell short" for row in rows) else 0


def prepared(folder: Path, kind: Run) -> Run:
    """The run undisturbed, whole and stopped half-way, to be copied by the cases."""
    begun = [("whole", [], None), ("half", kind.half, None)]
    if kind is SEARCH:
        # A trial that is at work and has a checkpoint; one whose result is there and that the study knows nothing of.
        begun = [("whole", [], None), ("half", [], (Study, "report", 2)), ("ended", [], (Study, "end", 2))]
    for name, arguments, fault in begun:
        path = folder / kind.name / name / "run"
        with dying(*fault) if fault else contextlib.nullcontext():
            code, _, err = run([*kind.command, *kind.config, f"run_dir={path}", *arguments])
        if code != (130 if fault else 0):
            raise SystemExit(f"the undisturbed {kind.name} failed with {code}: {err}")
    return kind.at(folder / kind.name)


@contextlib.contextmanager
def dying(owner: type, method: str, trial: int) -> Iterator[None]:
    """Inside it the process stops short of this method, once it is called for that trial."""
    kept = getattr(owner, method)

    def stop(self: object, number: int, *rest: object) -> object:
        if number == trial:
            raise KeyboardInterrupt
        return kept(self, number, *rest)

    setattr(owner, method, stop)
    try:
        yield
    finally:
        setattr(owner, method, kept)


def cases_of(kind: Run) -> Iterator[Case]:
    yield from damage(kind)
    yield from edits(kind)
    if kind.name != "search":
        yield from contents.cases(kind)
    yield from processes.cases(kind)


def damage(kind: Run) -> Iterator[Case]:
    for name, arguments, source in kind.uses:
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            inside = path.relative_to(source)
            for what, change in DAMAGES.items():

                def play(folder, source=source, arguments=arguments, inside=inside, change=change):
                    with lasting(source, folder) as run_dir:
                        target = run_dir / inside
                        data = target.read_bytes()
                        target.unlink()
                        if change:
                            target.write_bytes(change(data))
                        return judged(kind, run_dir, arguments, str(inside))

                yield Case("damage", f"{kind.name}: {inside} {what}, {name}", play)


def edits(kind: Run) -> Iterator[Case]:
    for name, arguments, source in kind.uses:
        for old, new in EDITS[kind.name]:

            def play(folder, source=source, arguments=arguments, old=old, new=new):
                with lasting(source, folder) as run_dir:
                    config = run_dir / "config.yaml"
                    text = config.read_text()
                    if old not in text:
                        return "fell short", f"the case is wrong: config.yaml has no {old!r}"
                    config.write_text(text.replace(old, new, 1))
                    return judged(kind, run_dir, arguments)

            yield Case("edited config", f"{kind.name}: {old!r} to {new!r}, {name}", play)


def table(rows: list[dict]) -> str:
    outcomes = ("held", "said", "fell short", "skipped")
    lines = [f"{'kind':16}{'tried':>7}" + "".join(f"{name:>12}" for name in outcomes)]
    for kind in [*dict.fromkeys(row["kind"] for row in rows), "all"]:
        of_kind = [row["outcome"] for row in rows if kind in (row["kind"], "all")]
        counts = "".join(f"{of_kind.count(name):>12}" for name in outcomes)
        lines.append(f"{kind:16}{len(of_kind):>7}{counts}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
