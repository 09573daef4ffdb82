"""Distils scikit-learn's digits into 10 images, one a class, and compares what nets learn from them.

python scripts/prove_distillation.py [--quick] [--json FILE] [--picture FILE.png]

Once for one fixed initialisation and once for random ones. The control is trained on random real images of the same
number, with as many steps and rates learnt in the same way. Exits 1 if with the fixed initialisation the distilled
images give less than 90% of the test accuracy that the whole training set gives.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from inner_loop.machine import machine
from metahpo.tuning import DistillationSettings, DistillationTuner, load_digits

NEEDED = 0.9
QUICK = {"steps": 4, "iterations": 40, "lr": 0.1, "rate_lr": 0.1, "rate": 0.2, "full_steps": 200}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, and the fixed initialisation alone")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--picture", type=Path, help="draw the images of the fixed initialisation here")
    options = parser.parse_args()
    torch.set_num_threads(1)  # Such small products only lose by threads.
    data = load_digits()
    rows: list[dict[str, Any]] = []
    for init in ["fixed"] if options.quick else ["fixed", "random"]:
        tuner = DistillationTuner(
            data["train"], None, DistillationSettings(init=init, **QUICK if options.quick else {})
        )
        started = time.perf_counter()
        found = tuner.run()
        seconds = time.perf_counter() - started
        print(f"{init} initialisation: {len(found.images)} images in {seconds:.0f} s", flush=True)
        for name, row in tuner.compare(*data["test"]).items():
            rows.append({"init": init, "training": name, **row, "distilled_in_seconds": seconds})
            spread = f" +- {row['accuracy_std']:.3f} over {row['runs']:.0f} runs" if row["runs"] > 1 else ""
            print(f"  {name:20} test accuracy {row['accuracy']:.3f}{spread}", flush=True)
        if options.picture and init == "fixed":
            found.pictures()["images"].savefig(options.picture)
    fixed = {row["training"]: row["accuracy"] for row in rows if row["init"] == "fixed"}
    share = fixed["distilled images"] / fixed["whole training set"]
    print(f"fixed initialisation: the distilled images give {share:.1%} of the whole training set's accuracy")
    if options.json:
        packages = ["scikit-learn", "numpy"]
        options.json.write_text(json.dumps({"machine": machine(packages), "rows": rows}, indent=2))
    return 0 if share >= NEEDED and fixed["distilled images"] > fixed["random real images"] else 1


if __name__ == "__main__":
    sys.exit(main())
