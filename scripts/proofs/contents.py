"""Checkpoints whose checksum is right and whose content is not what metahpo writes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch

from metahpo.training.checkpoint import CheckpointStore, position
from proofs.commands import Case, Run, judged, lasting

WRONG = [None, -1, "text", [], {}, [1], {"a": 1}, [{}], [{"epoch": "x"}], {1: None}, float("nan")]


def cases(kind: Run) -> Iterator[Case]:
    """Each entry of the newest checkpoint, and each entry of those that are trees, with wrong values in its place."""
    store = CheckpointStore(kind.uses[0][2] / "checkpoints")
    state = torch.load(store.list()[-1], weights_only=True)
    places = [(key,) for key in state]
    places += [(key, inner) for key in state if isinstance(state[key], dict) for inner in state[key]]
    places += [("history", 0, inner) for inner in state["history"][0]]
    # The settings, a tree of plain values, are compared with the config's whole.
    for place in [p for p in places if p[0] != "settings" or len(p) == 1]:
        for name, arguments, source in kind.uses:
            for value in WRONG if len(place) == 1 else [None, "text", {}, [1]]:

                def play(folder, place=place, arguments=arguments, source=source, value=value):
                    with lasting(source, folder) as run_dir:
                        store = CheckpointStore(run_dir / "checkpoints")
                        path = store.list()[-1]
                        changed = put(torch.load(path, weights_only=True), place, value)
                        path.unlink()
                        store.save(changed, *position(path), keep=range(9))
                        outcome, why = judged(kind, run_dir, arguments)
                        # A wrong value under a right checksum is no accident: others are no fault.
                        return ("held", why) if why.startswith("exit status 0") else (outcome, why)

                where = ".".join(map(str, place))
                yield Case("contents", f"{kind.name}: {where} = {value!r}, {name}", play)


def put(tree: Any, place: tuple, value: Any) -> Any:
    tree = copy.deepcopy(tree)
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return tree
