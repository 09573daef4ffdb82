"""``metahpo search``: any keys of a config, or settings of your own function, by a classic searcher."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metahpo.errors import CheckpointError, DataError, UsageError, shown
from metahpo.run_dirs import check_new, existing_run_dir, is_search, new_run_dir
from metahpo.runs import files
from metahpo.runs.files import read_json, write_json
from metahpo.runs.fingerprint import check_fingerprint, fingerprint, write_fingerprint

if TYPE_CHECKING:
    from metahpo.search_building import Search
    from metahpo.search_config import SearchConfig

SEARCH = """Searches the settings that CONFIG names for the best, and writes a report.

CONFIG holds a run (the config of a training, or its path), a space of its keys, and a searcher:

  run: ../quick.yaml
  space:
    learner.inner_lr: {float: [0.01, 1], log: true}
    net.filters: {choice: [16, 32]}
  searcher: {name: hyperband, max_budget: 5}
  search: {budget: 60, workers: 2}

Overrides change any key of it, and of the run:

  metahpo search CONFIG search.trials=20 run.training.epochs=3

The run directory (default: runs/CONFIG/DATE-TIME) holds config.yaml, study.db (Optuna's dashboard opens it), the run
of each trial, best.yaml (which metahpo train takes), and report/report.md. Ctrl-C or SIGTERM saves all that is at work
and exits with 130 or 143; --resume goes on from there, or after a crash, and may change how much is searched and where:

  metahpo search --resume RUN_DIR search.trials=40 search.workers=4"""


def add_search(commands: Any) -> None:
    """Adds the command to the parser's commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser("search", help="search settings by trials", description=SEARCH, formatter_class=raw)
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file, such as those in configs/*/search/")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="settings that replace the config's")
    parser.add_argument("--keys", action="store_true", help="print every key with its default and meaning")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a search that was stopped")
    parser.set_defaults(run=_search)


def _search(options: argparse.Namespace) -> int:
    # Imported here, so that --help and usage errors answer at once.
    from metahpo.search_building import build_search, make_executor
    from metahpo.search_keys import describe_search_keys

    if options.keys:
        print(describe_search_keys())
        return 0
    config, run_dir = _resumed(options) if options.resume else _begun(options)
    run_dir = run_dir and run_dir.absolute()  # The objective may change the working directory.
    executor = make_executor(config.search)
    search = build_search(config, str(run_dir / "config.yaml") if run_dir and options.resume else options.config)
    run_dir = run_dir or new_run_dir(Path(options.config))
    # The study first, which one process alone holds: a command that is refused changes nothing.
    with search.study(run_dir) as study:
        _write_config(config, search.data, run_dir, resumed=bool(options.resume))
        _run(search, study, executor, run_dir)
    return 0


def _begun(options: argparse.Namespace) -> tuple[SearchConfig, Path | None]:
    from metahpo.search_config import load_search

    if not options.config:
        raise UsageError("a CONFIG is needed, or --resume RUN_DIR; see metahpo search --help")
    config = load_search(options.config, options.overrides)
    if config.run_dir:
        check_new(config.run_dir)
        if (config.run_dir / "config.yaml").exists():
            raise CheckpointError(f"{config.run_dir} already holds a run; --resume it or choose another run_dir")
    return config, config.run_dir


def _resumed(options: argparse.Namespace) -> tuple[SearchConfig, Path]:
    from metahpo.search_config import CHANGEABLE, load_search

    # The first argument is taken for a CONFIG.
    given = [options.config, *options.overrides] if options.config else options.overrides
    allowed = [f"search.{key}" for key in CHANGEABLE]
    for override in given:
        if override.partition("=")[0] not in allowed:
            raise UsageError(
                f"--resume takes the run's own config, of which only {', '.join(allowed)} may change; "
                f"found {shown(override)} as well"
            )
    run_dir = existing_run_dir(options.resume)
    if not is_search(run_dir):
        raise UsageError(f"{options.resume} is not the run of a search; metahpo train or tune --resume goes on with it")
    return load_search(run_dir / "config.yaml", given), run_dir


def _write_config(config: SearchConfig, data: dict[str, Any], run_dir: Path, resumed: bool) -> None:
    """Writes the config, versions and fingerprint into the run directory; says where others may change figures."""
    from metahpo.config_file import dump_config
    from metahpo.training.checkpoint import write_atomically
    from metahpo.training.environment import versions
    from metahpo.training.settings import device_of

    run_dir.mkdir(parents=True, exist_ok=True)
    if not resumed and (run_dir / "config.yaml").exists():
        raise CheckpointError(f"{run_dir} already holds a run; --resume it or choose another run_dir")
    now = _fingerprint(config, data)
    if resumed:
        check_fingerprint(run_dir, now)
    write_atomically(run_dir / "config.yaml", dump_config(config).encode())
    if not resumed:
        write_fingerprint(run_dir, now)
    device = ((config.run or {}).get("training") or {}).get("device", "auto")
    path, found = run_dir / "versions.json", versions(device_of(device))
    for name, before in _versions(path).items() if resumed else ():
        if name in ("metahpo", "torch", "threads") and before != found.get(name):
            print(
                f"metahpo: begun with {name} {before}, now {found.get(name)}: figures may differ by rounding",
                file=sys.stderr,
            )
    write_json(path, found)


def _fingerprint(config: SearchConfig, data: dict[str, Any]) -> dict[str, Any]:
    """Without the versions, which versions.json has, and without what may change when a search goes on."""
    from metahpo.search_config import CHANGEABLE

    tree = config.model_dump(mode="json")
    tree["search"] = {key: value for key, value in tree["search"].items() if key not in CHANGEABLE}
    return fingerprint(tree, {}, data)


def _versions(path: Path) -> dict[str, str]:
    """Those that a search was begun with; raises CheckpointError if the file is damaged."""
    try:
        found = read_json(path) or {}
    except DataError as error:
        raise CheckpointError(f"{error}; it is not what a search writes; remove it") from None
    if not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{path} is damaged: it is not what a search writes; remove it")
    return found


def _run(search: Search, study: Any, executor: Any, run_dir: Path) -> None:
    from metahpo.search_results import SearchLog

    settings = search.config.search
    log = SearchLog(search, study, run_dir)
    log.begin(executor.workers)
    study.optimize(
        search.objective,
        settings.trials,
        executor,
        budget=settings.budget,
        max_failures=settings.max_failures,
        max_attempts=settings.max_attempts,
        on_trial=log.trial,
    )
    log.end()


def report_search(run_dir: Path) -> int:
    """Writes the report of a search's run again."""
    from metahpo.report.search import write_search_report
    from metahpo.search_config import load_search
    from metahpo.searchers.study import Study

    config = load_search(run_dir / "config.yaml")
    check_fingerprint(run_dir, _fingerprint(config, {}))
    search = config.search
    storage = search.storage or run_dir / "study.db"
    with Study.open(storage, name=search.name) as study:
        print(f"report: {files.shown(write_search_report(run_dir, study))}")
    files.say_left_out(run_dir, "versions.json")
    return 0
