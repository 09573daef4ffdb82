"""Glyphs: a small Omniglot-like data set that comes with the package, to try everything without a download."""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch

from metahpo.tasks.labelled import LabelledImages

SIZE = 28  # pixels a side


def load_glyphs() -> LabelledImages:
    """The bundled glyphs: characters of many writing systems, 20 images a class, split by script.

    images: uint8 [M, 1, 28, 28], ink 255 on 0, sorted by class; names are SCRIPT/CODEPOINT, such as "GREEK/03B1".
    Semi-synthetic: DejaVu and STIX drawings (see the licences beside the file), randomly warped and thresholded by
    `scripts/build_glyphs.py`. No script is in two splits; of characters that look alike, in whatever splits, only the
    first is in.
    """
    source = resources.files("metahpo.tasks") / "data" / "glyphs.npz"
    with source.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        bits, names = stored["bits"], tuple(str(name) for name in stored["names"])
        splits = {split: tuple(stored[split].tolist()) for split in ("train", "val", "test")}
    pixels = np.unpackbits(bits.swapaxes(-1, -2), axis=-1, count=SIZE) * np.uint8(255)
    labels = torch.arange(bits.shape[0]).repeat_interleave(bits.shape[1])
    return LabelledImages(torch.from_numpy(pixels.reshape(-1, 1, SIZE, SIZE)), labels, names, splits)
