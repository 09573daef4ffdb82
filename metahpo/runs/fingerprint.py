"""What a run's numbers depend on, kept with it and compared when it goes on."""

from __future__ import annotations

import json
import math
import re
import site
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from metahpo.errors import CheckpointError, ConfigError, DataError
from metahpo.runs.files import checksum, read_json, shown, write_json

FILE = "fingerprint.json"
# These give the same numbers (to rounding), or are of the test alone; all others should stay as they are.
MAY_CHANGE = {
    "run_dir",
    "device",
    *(f"training.{key}" for key in ("device", "engine", "threads", "read_every", "test_tasks")),
    *("training.check", "training.check_gradient", "data.root", "data.download"),
}
SAID = ("metahpo", "torch", "threads")
# How far sums of the same floats may differ, relative to that of their absolute values.
ROUNDING = 1e-5
_CODE = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")


def fingerprint(
    config: Mapping[str, Any], versions: Mapping[str, str], data: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What is kept, in plain values.

    Args:
        config: All settings, by section.
        versions: Of metahpo, torch and the rest.
        data: The data's ``identity`` (``metahpo.tasks.identity``); none where the config alone determines them.

    Returns:
        The config's keys, the checksums of the user's modules, the versions and the data.
    """
    keys: dict[str, Any] = {}
    for section, values in config.items():
        inside = values.items() if isinstance(values, Mapping) else [(None, values)]
        keys |= {section if key is None else f"{section}.{key}": value for key, value in inside}
    code = {name: checksum(path.read_bytes()) for name, path in _modules(keys)}
    kept = {name: versions[name] for name in SAID if name in versions}
    whole = {"config": keys, "code": code, "versions": kept, "data": data or {}}
    return json.loads(json.dumps(whole, default=str))


def may_change(keys: Mapping[str, Any]) -> set[str]:
    """The keys of a config that may change while a run goes on; keys: all, with their values.

    ``training.epochs`` is one of them unless the outer rate is annealed over all epochs.
    """
    free = keys.get("training.min_lr", 0) is None
    return MAY_CHANGE | {"training.epochs"} if free else MAY_CHANGE


def why_not(key: str) -> str:
    """Why a key that a user may well want to change may not; empty for all others."""
    return " (training.min_lr anneals the rate over all epochs)" if key == "training.epochs" else ""


def write_fingerprint(run_dir: Path, now: Mapping[str, Any]) -> None:
    write_json(run_dir / FILE, now)


def check_fingerprint(run_dir: Path, now: Mapping[str, Any]) -> None:
    """Says on stderr what may change and has, code too, and what cannot be compared.

    Raises:
        ConfigError: A key of config.yaml has changed since the run began.
        DataError: The data have.
        CheckpointError: The file is damaged.
    """
    path = run_dir / FILE
    try:
        kept = read_json(path)
    except DataError:
        kept = {}
    if kept is None:
        print(f"{shown(path)} is not there: whether config or code has changed since cannot be told", file=sys.stderr)
        with suppress(DataError):  # Which is said where the file is shown.
            before = read_json(run_dir / "versions.json") or {}
            _say_versions({name: before[name] for name in now["versions"] if name in before}, now["versions"])
        return
    kept.setdefault("data", {})  # Older versions wrote none.
    if not all(isinstance(kept.get(key), dict) for key in ("config", "code", "versions", "data")):
        raise CheckpointError(f"{shown(path)} is damaged; remove it to go on without comparing config, code and data")
    same = may_change(now["config"])
    lines = [
        f"{key}: config.yaml says {now['config'].get(key)!r:.80}, but the run began with "
        f"{kept['config'].get(key)!r:.80}{why_not(key)}; set it back, or begin a new run"
        for key in sorted({*kept["config"], *now["config"]} - same)
        if kept["config"].get(key) != now["config"].get(key)
    ]
    if lines:
        raise ConfigError("\n".join(lines))
    _check_data(kept["data"], now["data"], path)
    for name, before in kept["code"].items():
        if now["code"].get(name, before) != before:
            print(f"{name}: the module has changed since the run began: figures may differ", file=sys.stderr)
    _say_versions(kept["versions"], now["versions"])


def _say_versions(kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, before in kept.items():
        if now.get(name) != before:
            much = "" if name == "metahpo" else " by rounding"
            print(f"begun with {name} {before}, now {now.get(name)}: figures may differ{much}", file=sys.stderr)


def _check_data(kept: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raises DataError for the first part of the data, of those that both have, that is not what it was."""
    for name in (name for name in now if name in kept and not _alike(kept[name], now[name])):
        before, found = (f"{part.get('type')} {part.get('shape')}" for part in (kept[name], now[name]))
        what = f"found {found}, " + (f"the run began with {before}" if found != before else "with other content")
        raise DataError(
            f"data: the {name} have changed since the run began: {what}; put them back, or begin a new run (or remove "
            f"{shown(path)} to go on with them)"
        )


def _alike(kept: Any, now: Mapping[str, Any]) -> bool:
    if not isinstance(kept, dict) or any(kept.get(key) != now[key] for key in ("type", "shape")):
        return False
    if "size" not in now:
        return kept == now
    near = ROUNDING * now["size"]
    pairs = zip(kept.get("sums", ()), now["sums"], strict=False)
    return all(abs(a - b) <= near or (math.isnan(a) and math.isnan(b)) or a == b for a, b in pairs)


def _modules(keys: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """The modules that a config names, and the loaded ones that lie in the same folder or below, with their files.

    Of installed packages, which have versions, those that are named alone.
    """
    named = dict(_named(keys))
    yield from named.items()
    folders = {_folder(name, path) for name, path in named.items()}
    folders = {folder for folder in folders if not _installed(folder / "module.py")}
    # There are thousands of modules; to look for each one's file takes long.
    for name, module in list(sys.modules.items()) if folders else ():
        if name in named or name.partition(".")[0] in ("metahpo", "__main__", "__mp_main__"):
            continue
        path = _file(module)
        if path and folders & {*path.parents} and not _installed(path):
            yield name, path


def _named(tree: Any) -> Iterator[tuple[str, Path]]:
    """The loaded modules that values of the form MODULE:NAME name, with their files."""
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _named(value)
    elif isinstance(tree, str) and (match := _CODE.fullmatch(tree)) and (path := _file(sys.modules.get(match[1]))):
        yield match[1], path


def _file(module: Any) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file) if isinstance(file, str) and Path(file).is_file() else None


def _folder(name: str, path: Path) -> Path:
    """The folder from which a module is imported by its name."""
    return (path.parent if path.name == "__init__.py" else path).parents[name.count(".")]


def _installed(path: Path) -> bool:
    return any(Path(folder) in path.parents for folder in (sys.prefix, sys.base_prefix, *site.getsitepackages()))
