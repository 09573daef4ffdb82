"""``metahpo tune``: hyperparameters of one training, by gradient."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from metahpo.errors import UsageError
from metahpo.run_dirs import check_new, existing_run_dir, new_run_dir
from metahpo.runs.files import shown, write_json
from metahpo.runs.fingerprint import MAY_CHANGE, check_fingerprint, fingerprint, write_fingerprint
from metahpo.runs.lock import holding_run

HELP = {
    "rates": "learning rates, momenta and weight decays by layer and by phase of the training",
    "decay": "weight decay: one, one by layer, or one by parameter",
    "clean": "a weight for every training example; finds wrong labels",
    "distill": "a few images on which a net trains as on the whole data",
}
TUNE = """Tunes {what}, tests the outcome, and writes a report.

Overrides change any key of the config:

  metahpo tune {kind} configs/digits/{kind}.yaml tune.iterations=20 net=my_module:build

The run directory (default: runs/CONFIG/DATE-TIME) holds config.yaml, versions.json, metrics.csv, checkpoints/,
result.pt (read by metahpo.tuning.load_result(file)), test.json and report/report.md; clean adds
suspects.csv. Ctrl-C or SIGTERM ends the current step, saves, and exits with 130 or 143; --resume
goes on from there, or after a crash."""


def add_tune(commands: Any, positive: Callable[[str], int]) -> None:
    """Adds the command and its kinds to the parser's commands; positive: reads a whole number of at least 1."""
    raw = argparse.RawDescriptionHelpFormatter
    tune = commands.add_parser("tune", help="tune hyperparameters of one training by gradient")
    kinds = tune.add_subparsers(required=True, metavar="KIND")
    for kind, what in HELP.items():
        parser = kinds.add_parser(kind, help=what, description=TUNE.format(kind=kind, what=what), formatter_class=raw)
        parser.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file, such as those under configs/")
        parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="settings that replace the config's")
        parser.add_argument("--keys", action="store_true", help="print every key with its default and meaning")
        parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a run that was stopped")
        parser.add_argument(
            "--until", type=positive, metavar="N", help="stop after N outer steps in all; --resume goes on"
        )
        parser.set_defaults(run=_tune, kind=kind)


def _tune(options: argparse.Namespace) -> int:
    # Imported here, so that --help and usage errors answer at once.
    from metahpo.config_file import describe_keys, dump_config, load_config, located
    from metahpo.training.checkpoint import write_atomically
    from metahpo.training.settings import device_of
    from metahpo.tune_building import build_tuner
    from metahpo.tune_config import SCHEMAS
    from metahpo.tuning.run import TuningRun

    schema = SCHEMAS[options.kind]
    if options.keys:
        print(describe_keys(schema))
        return 0
    given = [options.config, *options.overrides] if options.config else options.overrides
    if options.resume and given:
        raise UsageError(f"--resume takes the run's own config; found {' '.join(given)!r} as well")
    if not options.resume and not options.config:
        raise UsageError(f"a CONFIG is needed, or --resume RUN_DIR; see metahpo tune {options.kind} --help")
    with ExitStack() as held:
        run_dir = existing_run_dir(options.resume) if options.resume else None
        if run_dir:
            held.enter_context(holding_run(run_dir))
        written = load_config(run_dir / "config.yaml" if run_dir else options.config, options.overrides, schema)
        config = located(written)
        if run_dir is None and config.run_dir:
            check_new(config.run_dir)
        tuner, data = build_tuner(options.kind, config)
        if run_dir is None:
            run_dir = config.run_dir or new_run_dir(Path(options.config))
            held.enter_context(holding_run(run_dir))
            check_new(run_dir)  # Another process may have begun one since.
            write_atomically(run_dir / "config.yaml", dump_config(written).encode())
            write_fingerprint(run_dir, _fingerprint(config, data))
        device = device_of(config.device)
        run = TuningRun(tuner, run_dir, _settings(written), device)
        if options.resume:
            run.resume()
            check_fingerprint(run_dir, _fingerprint(config, data))
            done = tuner.iteration >= tuner.iterations
            where = f"all {tuner.iteration} outer steps are done" if done else f"at outer step {tuner.iteration + 1}"
            print(f"resuming {shown(run_dir)}: {where}", flush=True)
        else:
            total = f"{tuner.iterations} outer steps on {device}"
            print(f"{options.config}: {tuner.title}, {total}, run directory {shown(run_dir)}")
        result = run.fit(options.until, lambda row: print(_line(row, tuner.iterations), flush=True))
        _finish(run_dir, tuner, result, data)
    return 0


def _fingerprint(config: Any, data: Any) -> dict[str, Any]:
    from metahpo.tasks.identity import identity
    from metahpo.training.environment import versions
    from metahpo.training.settings import device_of

    parts = {f"{what} of {name}": tensor for name, part in data.items() for what, tensor in zip(part._fields, part)}
    return fingerprint(config.model_dump(mode="json"), versions(device_of(config.device)), identity(parts))


def _settings(config: Any) -> dict[str, Any]:
    """What a run's numbers depend on, by dotted key."""
    tree = config.model_dump(mode="json", exclude={"run_dir", "device"})
    keys = {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}
    return {key: value for key, value in keys.items() if key not in MAY_CHANGE}


def _finish(run_dir: Path, tuner: Any, result: Any, data: Any) -> None:
    """Tests the outcome and writes it down: result.pt, test.json, the report."""
    from metahpo.report.tuning import write_tuning_report
    from metahpo.tuning.run import save_result

    save_result(run_dir / "result.pt", result)
    if hasattr(result, "suspects"):
        result.suspects.to_csv(run_dir / "suspects.csv")
        print(f"{result.verdict}; suspects.csv lists {len(result.suspects)}")
    rows = tuner.compare(data["test"].x, data["test"].y)
    if "clean" in data and hasattr(result, "against"):
        rows["suspected, against the labels made wrong"] = result.against(data["train"].y != data["clean"].y)
    write_json(run_dir / "test.json", {"examples": len(data["test"].x), "rows": rows})
    for line in tuner.warnings:
        print(f"warning: {line}")
    print(f"{len(data['test'].x)} test examples:")
    for name, row in rows.items():
        print(f"  {name:40} {', '.join(f'{key} {_figure(key, value)}' for key, value in row.items())}")
    print(f"report: {shown(write_tuning_report(run_dir, result, tuner.title))}")


def _line(row: dict[str, float], total: int) -> str:
    figures = [
        f"{key.replace('_', ' ')} {_figure(key, v)}" for key, v in row.items() if key not in ("iteration", "seconds")
    ]
    return f"step {int(row['iteration'])}/{total}  {'  '.join(figures)}  {row['seconds']:.1f} s"


def _figure(key: str, value: float) -> str:
    return f"{value:.1%}" if "accuracy" in key or key in ("f1", "precision", "recall") else f"{value:.4g}"
