"""What a run's numbers depend on, kept with it and compared when it goes on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metahpo.errors import CheckpointError, ConfigError, DataError
from metahpo.runs.files import checksum, read_json, shown, write_json

FILE = "fingerprint.json"
# These give the same numbers (to rounding), or are of the test alone; all others should stay as they are.
MAY_CHANGE = {
    "run_dir",
    "device",
    *(f"training.{key}" for key in ("device", "engine", "threads", "check", "read_every", "test_tasks")),
    *("data.root", "data.download"),
}
SAID = ("metahpo", "torch", "threads")
_CODE = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")


def fingerprint(config: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    """A config's keys, the checksums of the user's modules that it names, and the versions, in plain values."""
    keys: dict[str, Any] = {}
    for section, values in config.items():
        inside = values.items() if isinstance(values, Mapping) else [(None, values)]
        keys |= {section if key is None else f"{section}.{key}": value for key, value in inside}
    code = {name: checksum(path.read_bytes()) for name, path in _modules(keys)}
    kept = {name: versions[name] for name in SAID if name in versions}
    config = {key: value for key, value in keys.items() if key not in MAY_CHANGE}
    return json.loads(json.dumps({"config": config, "code": code, "versions": kept}, default=str))


def write_fingerprint(run_dir: Path, now: Mapping[str, Any]) -> None:
    write_json(run_dir / FILE, now)


def check_fingerprint(run_dir: Path, now: Mapping[str, Any]) -> None:
    """Says on stderr what may change and has, and what cannot be compared.

    Raises:
        ConfigError: A key of config.yaml or a module of the user's has changed since the run began.
        CheckpointError: The file is damaged.
    """
    path = run_dir / FILE
    try:
        kept = read_json(path)
    except DataError:
        kept = {}
    if kept is None:
        print(f"{shown(path)} is not there: whether config or code has changed since cannot be told", file=sys.stderr)
        return
    if not all(isinstance(kept.get(key), dict) for key in ("config", "code", "versions")):
        raise CheckpointError(f"{shown(path)} is damaged; remove it to go on without comparing config and code")
    lines = [
        f"{key}: config.yaml says {now['config'].get(key)!r:.80}, but the run began with "
        f"{kept['config'].get(key)!r:.80}; set it back, or begin a new run"
        for key in sorted({*kept["config"], *now["config"]})
        if kept["config"].get(key) != now["config"].get(key)
    ]
    lines += [
        f"{name}: the module has changed since the run began; put it back, or begin a new run"
        for name in kept["code"]
        if name in now["code"] and kept["code"][name] != now["code"][name]
    ]
    if lines:
        raise ConfigError("\n".join(lines))
    for name, before in kept["versions"].items():
        if now["versions"].get(name) != before:
            found = now["versions"].get(name)
            print(f"begun with {name} {before}, now {found}: figures may differ by rounding", file=sys.stderr)


def _modules(tree: Any) -> Iterator[tuple[str, Path]]:
    """The loaded modules that values of the form MODULE:NAME name, with their files."""
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _modules(value)
    elif isinstance(tree, str) and (match := _CODE.fullmatch(tree)):
        file = getattr(sys.modules.get(match[1]), "__file__", None)
        if file and Path(file).is_file():
            yield match[1], Path(file)
