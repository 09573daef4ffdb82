"""The command line."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from metahpo import __version__, torchrun
from metahpo.cli_search import add_search
from metahpo.cli_tune import add_tune
from metahpo.errors import DataError, MetaHPOError, NonFiniteError, RankError, UsageError, one_line, out_of_memory
from metahpo.run_dirs import check_new, existing_run_dir, is_search, new_run_dir, trained_run_dir
from metahpo.runs.files import read_json, say_left_out, shown, with_short_paths, write_atomically, write_json
from metahpo.runs.fingerprint import check_fingerprint, fingerprint, write_fingerprint
from metahpo.runs.lock import holding_run

TRAIN = """Meta-trains the learner that CONFIG describes, tests it, and writes a report.

Overrides change any key of the config:

  metahpo train configs/glyphs_5way_1shot/quick.yaml training.epochs=20 net.filters=64

The run directory (default: runs/CONFIG/DATE-TIME) holds config.yaml, versions.json, metrics.csv, checkpoints/,
test.json and report/report.md. Ctrl-C or SIGTERM ends the current step, saves, and exits with 130 or 143;
--resume goes on from there, or after a crash, to the same result bit for bit. To train longer:

  metahpo train --resume RUN_DIR training.epochs=200

which a run with training.min_lr refuses, for its outer rate is annealed over all epochs.

Several GPUs share each batch of tasks:

  torchrun --nproc-per-node 4 -m metahpo train CONFIG"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 (training diverged), 2 (bad input), 130/143 (stopped)."""
    try:
        options = _parse(arguments)
        return options.run(options)
    except NonFiniteError as error:
        _say(str(error), everywhere=True)
        return 1
    except MetaHPOError as error:
        _say(str(error), everywhere=isinstance(error, UsageError))
        return 1 if isinstance(error, RankError) else 2
    except KeyboardInterrupt as stop:
        _say(str(stop) or "stopped by SIGINT", everywhere=True)
        return 128 + getattr(stop, "signum", 2)
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print(f"metahpo: {one_line(error)}; choose fewer training.tasks or engine loop", file=sys.stderr)
        return 1
    except OSError as error:
        # A full disk, a folder that may not be read or written.
        print(f"metahpo: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}", file=sys.stderr)
        return 2


def _say(text: str, everywhere: bool) -> None:
    """Tells what stopped the program; everywhere: every rank of a run has it to say, so that one is enough."""
    for line in text.splitlines() if torchrun.rank() == 0 or not everywhere else ():
        print(f"metahpo: {with_short_paths(line)}", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """Reports a usage error as every other bad input: one line."""

    def error(self, message: str):
        raise UsageError(f"{message}; see {self.prog} --help")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments up to the first option only; overrides may also follow one.
    if rest and (not hasattr(options, "overrides") or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="metahpo", description="Meta-learning and hyperparameter optimisation.")
    parser.add_argument("--version", action="version", version=f"metahpo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    train = commands.add_parser("train", help="meta-train, test and report", description=TRAIN, formatter_class=raw)
    train.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a YAML file; the repository has some under configs/"
    )
    train.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="settings that replace the config's")
    train.add_argument("--keys", action="store_true", help="print every key of a config, with its default and meaning")
    train.add_argument("--resume", metavar="RUN_DIR", help="go on with a run that was stopped")
    train.add_argument(
        "--until-epoch",
        type=_positive,
        metavar="N",
        help="stop after N epochs in all, test and report; --resume goes on",
    )
    train.set_defaults(run=_train)

    add_tune(commands, _positive)
    add_search(commands)

    evaluate = commands.add_parser(
        "evaluate",
        help="test a run's best checkpoint and its ensemble",
        description="Tests the best checkpoint by validation, and the best ones together, on fixed tasks of a split. "
        "The figures go to RUN_DIR/SPLIT.json.",
    )
    evaluate.add_argument("run_dir", metavar="RUN_DIR")
    evaluate.add_argument("--split", default="test", choices=["train", "val", "test"])
    evaluate.add_argument("--tasks", type=_several, help="how many tasks (default: the config's training.test_tasks)")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser(
        "report",
        help="write a run's report again",
        description="Writes RUN_DIR/report/report.md and its pictures from what the run directory holds.",
    )
    report.add_argument("run_dir", metavar="RUN_DIR")
    report.set_defaults(run=_report)
    return parser


def _positive(text: str) -> int:
    return _at_least(1, text)


def _several(text: str) -> int:
    return _at_least(2, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"should be a whole number of at least {least}, found {text!r}")
    return int(text)


def _train(options: argparse.Namespace) -> int:
    # Imported here, so that --help and usage errors answer at once.
    from metahpo.config_file import describe_keys
    from metahpo.training.distributed import process_group

    if options.keys:
        print(describe_keys())
        return 0
    given = [options.config, *options.overrides] if options.config else options.overrides
    for override in given if options.resume else ():
        if override.partition("=")[0] != "training.epochs":
            raise UsageError(
                f"--resume takes the run's own config, of which only training.epochs may change; found {override!r} "
                "as well"
            )
    options.overrides = given if options.resume else options.overrides
    if not options.resume and not options.config:
        raise UsageError("a CONFIG is needed, or --resume RUN_DIR; see metahpo train --help")
    with ExitStack() as held, process_group() as ranks:
        config, run_dir, trainer = _resumed(options, ranks, held) if options.resume else _begun(options, ranks, held)
        show = print if ranks.first else _nothing
        trainer.fit(
            options.until_epoch, on_epoch=lambda row: show(_epoch_line(row, config.training.epochs), flush=True)
        )
        if ranks.first:
            print(_best_line(trainer.history))
        learner, tasks = _test(config, run_dir, "test", config.training.test_tasks, ranks)
        if ranks.first:
            _write_report(run_dir, learner, tasks.task(0))
    return 0


def _begun(options: argparse.Namespace, ranks: Any, held: ExitStack):
    """The config, run directory and trainer of a new run. Rank 0 alone reads the config and writes."""
    from metahpo.building import build
    from metahpo.config_file import dump_config, load_config, located
    from metahpo.training import Trainer

    def read():
        config = load_config(options.config, options.overrides)
        if config.run_dir:
            check_new(config.run_dir)
        return config

    def make() -> Path:
        run_dir = config.run_dir or new_run_dir(Path(options.config))
        held.enter_context(holding_run(run_dir))
        check_new(run_dir)  # Another process may have begun one since.
        write_atomically(run_dir / "config.yaml", dump_config(written).encode())
        write_fingerprint(run_dir, _fingerprint(config, tasks))
        return run_dir

    written = ranks.on_first(read)
    config = located(written)
    tasks, learner = build(config)
    run_dir = ranks.on_first(make)
    trainer = Trainer(learner, tasks["train"], tasks["val"], config.training, run_dir)
    if ranks.first:
        count = sum(p.numel() for p in trainer.learner.outer_params().values())
        where = f"{trainer.device}, {ranks.size} ranks" if ranks.size > 1 else trainer.device
        print(f"{options.config}: {count:,} meta-parameters on {where}, run directory {shown(run_dir)}", flush=True)
    return config, run_dir, trainer


def _resumed(options: argparse.Namespace, ranks: Any, held: ExitStack):
    """The config, run directory and trainer of the run to go on with."""
    from metahpo.building import resume_trainer
    from metahpo.config_file import dump_config, located

    written, run_dir = _kept(options.resume, ranks, held, options.overrides)
    config = located(written)
    trainer = resume_trainer(config, run_dir)
    tasks = {"train": trainer.train_tasks, "val": trainer.val_tasks}

    def check() -> None:
        check_fingerprint(run_dir, _fingerprint(config, tasks))
        if options.overrides:
            write_atomically(run_dir / "config.yaml", dump_config(written).encode())

    ranks.on_first(check)
    if ranks.first:
        if trainer.epoch < config.training.epochs:
            where = f"at epoch {trainer.epoch + 1}, iteration {trainer.iteration + 1}"
            print(f"resuming {shown(run_dir)} {where}", flush=True)
        else:
            print(f"{shown(run_dir)} is trained: all {trainer.epoch} epochs are done")
    return config, run_dir, trainer


def _kept(name: str, ranks: Any, held: ExitStack, overrides: Sequence[str] = ()):
    """The config, with overrides, and the folder of the training in the run directory ``name``, held from now on."""
    from metahpo.config_file import load_config

    def read():
        run_dir = trained_run_dir(name)
        held.enter_context(holding_run(run_dir))
        return load_config(run_dir / "config.yaml", overrides), run_dir

    return ranks.on_first(read)


def _fingerprint(config: Any, tasks: Mapping[str, Any]) -> dict[str, Any]:
    from metahpo.building_data import data_identity
    from metahpo.training.environment import versions

    kept = versions(config.training.torch_device())
    return fingerprint(config.model_dump(mode="json"), kept, data_identity(config, tasks))


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What the other ranks print."""


def _evaluate(options: argparse.Namespace) -> int:
    from metahpo.config_file import located
    from metahpo.training.distributed import process_group

    with ExitStack() as held, process_group() as ranks:
        written, run_dir = _kept(options.run_dir, ranks, held)
        config = located(written)
        _test(config, run_dir, options.split, options.tasks or config.training.test_tasks, ranks, keep=True)
    return 0


def _report(options: argparse.Namespace) -> int:
    from metahpo.building import build_for
    from metahpo.config_file import load_config, located
    from metahpo.training.ensemble import load_best

    if is_search(existing_run_dir(options.run_dir)):
        from metahpo.cli_search import report_search

        return report_search(existing_run_dir(options.run_dir))
    run_dir = trained_run_dir(options.run_dir)
    with holding_run(run_dir):
        config = located(load_config(run_dir / "config.yaml"))
        tasks, learner = build_for(config, "test")
        check_fingerprint(run_dir, _fingerprint(config, {"test": tasks}))
        load_best(run_dir, learner)
        _write_report(run_dir, learner, tasks.task(0))
        say_left_out(run_dir, "test.json", "versions.json")
    return 0


def _free(run_dir: Path, split: str, count: int, result: dict[str, Any]) -> Path:
    """The first file of the test's that holds no other test's figures."""

    def taken(path: Path) -> bool:
        try:
            kept = read_json(path)
        except DataError as error:
            print(f"{error}; written again", file=sys.stderr)
            return False
        return kept is not None and json.dumps(kept) != json.dumps(result)

    names = itertools.chain([split, f"{split}-{count}"], (f"{split}-{count}-{n}" for n in itertools.count(2)))
    paths = (run_dir / f"{name}.json" for name in names)
    return next(path for path in paths if not taken(path))


def _test(config: Any, run_dir: Path, split: str, count: int, ranks: Any, keep: bool = False):
    from metahpo.building import build_for
    from metahpo.training.ensemble import evaluate_run

    with ranks.agreed():
        tasks, learner = build_for(config, split)
    if keep:
        ranks.on_first(lambda: check_fingerprint(run_dir, _fingerprint(config, {split: tasks})))
    rows = evaluate_run(run_dir, learner, tasks, count, config.training)
    if ranks.first:
        result = {"split": split, "tasks": count, "rows": rows}
        path = _free(run_dir, split, count, result) if keep else run_dir / f"{split}.json"
        write_json(path, result)
        if path.stem != split:
            print(f"{shown(run_dir / f'{split}.json')} holds another test; these figures: {shown(path)}")
        print(f"{count} {split} tasks (± 95% confidence):")
        for name, row in rows.items():
            print(f"  {name:14} {_result(row)}")
    return learner, tasks


def _write_report(run_dir: Path, learner: Any, example: Any) -> None:
    from metahpo.report import write_report

    print(f"report: {shown(write_report(run_dir, learner.cpu(), example.to('cpu')))}")


def _epoch_line(row: dict[str, float], epochs: int) -> str:
    if "val_accuracy" in row:
        train = f"{row['train_accuracy']:.1%}" if "train_accuracy" in row else "-"
        result = f"accuracy: train {train}, val {row['val_accuracy']:.1%} ± {100 * row['val_accuracy_ci']:.1f}"
        if "val_accuracy_inductive" in row:
            result += f", inductive {row['val_accuracy_inductive']:.1%}"
    else:
        train = f"train return {row['train_return']:.2f}, " if "train_return" in row else ""
        result = f"{train}val {_figures({name.removeprefix('val_'): value for name, value in row.items()})}"
    return f"epoch {int(row['epoch'])}/{epochs}  train loss {row['train_loss']:.4f}  {result}  {row['seconds']:.0f} s"


def _best_line(history: Sequence[dict[str, float]]) -> str:
    """The epoch that is tested; with all digits, for a search gives that figure as a trial's score."""
    from metahpo.training.metrics import best_epochs, judged_by

    best = best_epochs(history, 1)[0]
    row = next(row for row in history if row["epoch"] == best)
    name = judged_by(row)
    return f"best epoch by validation: {best}, {name} {row[f'val_{name}']!r}"


def _result(row: dict[str, float]) -> str:
    if "accuracy" in row:
        result = f"accuracy {row['accuracy']:.1%} ± {100 * row['accuracy_ci']:.1f} transductive"
        if "accuracy_inductive" in row:
            result += f", {row['accuracy_inductive']:.1%} ± {100 * row['accuracy_inductive_ci']:.1f} inductive"
        return result + (f", before adapting {row['accuracy_before']:.1%}" if "accuracy_before" in row else "")
    return _figures(row)


def _figures(row: dict[str, float]) -> str:
    """The return of a policy, or the loss."""
    name, digits = ("return", 2) if "return" in row else ("loss", 4)
    before = f", before adapting {row[f'{name}_before']:.{digits}f}" if f"{name}_before" in row else ""
    return f"{name} {row[name]:.{digits}f} ± {row[f'{name}_ci']:.{digits}f}{before}"


if __name__ == "__main__":
    sys.exit(main())
