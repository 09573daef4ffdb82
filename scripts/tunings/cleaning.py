"""The proof of ``clean``: which wrong labels each rule finds, and what training without them is worth."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.linear_model import LogisticRegression

from metahpo.tuning.cleaning import CleaningTuner
from metahpo.tuning.data import Labelled, load_digits, shuffled, with_wrong_labels
from metahpo.tuning.settings import CleaningSettings
from tunings.figures import Row, score, spread

# (data set, kind of mistakes): (sizes, shares of wrong labels, rate of the training).
CLEANED: dict[tuple[str, str], tuple[tuple[int, int, int], tuple[float, ...], float]] = {
    ("digits", "any class"): ((900, 300, 597), (0.0, 0.05, 0.2, 0.5), 1.0),
    ("digits, half trusted", "any class"): ((600, 600, 597), (0.0, 0.05, 0.2, 0.5), 1.0),
    ("digits", "next class"): ((900, 300, 597), (0.05, 0.2, 0.4), 1.0),
    ("breast cancer", "any class"): ((300, 100, 169), (0.0, 0.05, 0.2), 0.1),
    ("wine", "any class"): ((80, 30, 68), (0.0, 0.05, 0.2), 0.1),
}


def prove_clean(quick: bool, seeds: int) -> list[Row]:
    """Each rule names suspects; the same net is trained on the others and the trusted ones."""
    if quick:
        return cleaned("digits", "any class", (300, 150, 300), 0.1, 0, {"lr": 1.0, "iterations": 3})
    return [
        row
        for (name, mistakes), (sizes, shares, lr) in CLEANED.items()
        for share in shares
        for seed in range(seeds)
        for row in cleaned(name, mistakes, sizes, share, seed, {"lr": lr, "iterations": 50})
    ]


def cleaned(name: str, mistakes: str, sizes: tuple[int, int, int], share: float, seed: int, settings: Row) -> list[Row]:
    data = table(name, sizes, seed)
    right, trusted = data["train"], data["val"]
    given = next_class(right, share, seed) if mistakes == "next class" else with_wrong_labels(right, share, seed)
    wrong = given.y != right.y
    started = time.perf_counter()
    tuner = CleaningTuner(given, trusted, None, CleaningSettings(seed=seed, **settings))
    found: Any = tuner.run()
    seconds = time.perf_counter() - started
    regression = LogisticRegression(max_iter=1000).fit(trusted.x.flatten(1).numpy(), trusted.y.numpy())
    contradicted = torch.as_tensor(regression.predict(given.x.flatten(1).numpy())) != given.y
    suspected = torch.zeros_like(wrong)
    suspected[found.suspected] = True
    rules = {
        "no cleaning": torch.zeros_like(wrong),
        "contradicted by a regression on trusted ones": contradicted,
        "gradient weight below 1/2": found.gradient_weights < 0.5,
        "clean": suspected,
        "all wrong ones, as if known": wrong,
    }
    return [
        {
            "what": "clean",
            "data": name,
            "mistakes": mistakes,
            "share": share,
            "seed": seed,
            "name": rule,
            "suspects": int(low.sum()),
            "f1": 2 * int((low & wrong).sum()) / max(int(low.sum() + wrong.sum()), 1),
            "accuracy": score(tuner.trained(given.select(~low)), data["test"])["accuracy"],
            "keep_all": found.keep_all,
            "seconds": seconds,
        }
        for rule, low in rules.items()
    ]


def tell_clean(rows: list[Row]) -> None:
    columns = ["data", "mistakes", "wrong", "rule", "suspects", "F1", "test accuracy"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    keys = ("data", "mistakes", "share", "name")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for (data, mistakes, share, name), own in groups.items():
        f1 = spread([row["f1"] for row in own]) if share else "–"
        suspects = f"{statistics.mean(row['suspects'] for row in own):.1f}"
        if name == "clean":
            suspects += f" (keep all: {sum(row['keep_all'] for row in own)} of {len(own)})"
        accuracy = spread([row["accuracy"] for row in own])
        print(f"| {data} | {mistakes} | {share:.0%} | {name} | {suspects} | {f1} | {accuracy} |")
    gaps = [
        statistics.mean(row["accuracy"] for row in own)
        - statistics.mean(row["accuracy"] for row in groups[(*key[:3], "no cleaning")])
        for key, own in groups.items()
        if key[3] == "clean"
    ]
    print(f"least gain of test accuracy over no cleaning: {min(gaps):+.4f}")


def table(name: str, sizes: tuple[int, int, int], seed: int) -> dict[str, Labelled]:
    """A data set of scikit-learn's in parts "train", "val" (trusted) and "test"."""
    if name.startswith("digits"):
        return load_digits(sizes, seed)
    x, y = {"breast cancer": load_breast_cancer, "wine": load_wine}[name](return_X_y=True)
    x = torch.as_tensor(x).float()
    whole = Labelled((x - x.mean(0)) / x.std(0), torch.as_tensor(y).long())
    return dict(zip(("train", "val", "test"), shuffled(whole, sizes, seed)))


def next_class(data: Labelled, share: float, seed: int) -> Labelled:
    """The data with ``share`` of its labels, drawn by ``seed``, replaced by the class after."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randperm(len(data.y), generator=generator)[: round(share * len(data.y))]
    y = data.y.clone()
    y[which] = (y[which] + 1) % data.classes
    return Labelled(data.x, y)
