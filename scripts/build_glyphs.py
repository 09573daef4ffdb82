"""Build the bundled glyph data set from the fonts that matplotlib ships: `python scripts/build_glyphs.py [--out FILE]`.

A class is a character, a "script" a Unicode script or block, and splits are by script, as Omniglot's are by alphabet.
The images are semi-synthetic: each is a font's drawing of the character, warped by a random affine and elastic map that
stands in for a drawer's hand. Rotation is never used to make new classes: arrows and syllabics have rotated twins.

Every class has a generator of its own (seeded by the code point), so that it comes out the same whatever is built with
it. Needs matplotlib with its dependencies Pillow and fontTools; the package itself reads only the file written here.
"""

from __future__ import annotations

import argparse
import shutil
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from fontTools import unicodedata as unicode_tables
from fontTools.ttLib import TTFont
from PIL import Image, ImageFilter, ImageFont
from torch import Tensor
from torch.nn import functional as F

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FACES = tuple(
    family + style
    for family, styles in {
        "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
        "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
    }.items()
    for style in styles
)
LICENCES = ("LICENSE_DEJAVU", "LICENSE_STIX")
OUT = Path(__file__).resolve().parents[1] / "metahpo" / "tasks" / "data" / "glyphs.npz"

SEED = 0
SIZE = 28  # pixels a side of an image
IMAGES_PER_CLASS = 20
CLASSES_PER_SCRIPT = 64  # at most, so that no script dominates a split
SAME_SHAPE = 0.90  # correlation of box-normalised shapes from which two characters count as one
POINTS = 72  # font size
TEMPLATE, LONGEST = 64, 52  # side of a template and longest side of the character in it, pixels
CANVAS = 40  # pixels a side that are drawn before the image is cut out, so that ink outside it can be seen and moved in


class Script(NamedTuple):
    """A group of characters: its split, its Unicode script (ISO 15924) and, where that is too wide, its blocks."""

    split: str
    code: str
    blocks: tuple[str, ...] = ()


# Look-alikes share a split: Latin, Greek, Cyrillic, Lisu and Old Italic have letters in common.
SCRIPTS = {
    "LATIN": Script("train", "Latn", ("Basic Latin", "Latin-1 Supplement", "Latin Extended-A", "Number Forms")),
    "LATIN-EXTENDED": Script("train", "Latn", ("Latin Extended-B", "Latin Extended-C", "Latin Extended-D")),
    "IPA": Script("train", "Latn", ("IPA Extensions",)),
    "PHONETIC": Script("train", "Latn", ("Phonetic Extensions", "Phonetic Extensions Supplement")),
    "GREEK": Script("train", "Grek"),
    "COPTIC": Script("train", "Copt"),
    "CYRILLIC": Script("train", "Cyrl", ("Cyrillic",)),
    "CYRILLIC-EXTENDED": Script("train", "Cyrl", ("Cyrillic Supplement", "Cyrillic Extended-B")),
    "LISU": Script("train", "Lisu"),
    "OLD-ITALIC": Script("train", "Ital"),
    "PUNCTUATION": Script(
        "train", "Zyyy", ("Basic Latin", "Latin-1 Supplement", "General Punctuation", "Supplemental Punctuation")
    ),
    "CURRENCY": Script("train", "Zyyy", ("Currency Symbols",)),
    "ARROWS": Script("train", "Zyyy", ("Arrows",)),
    "ARROWS-SUPPLEMENTAL": Script(
        "train", "Zyyy", ("Supplemental Arrows-A", "Supplemental Arrows-B", "Miscellaneous Symbols and Arrows")
    ),
    "MATHEMATICS": Script("train", "Zyyy", ("Mathematical Operators",)),
    "MATHEMATICS-SUPPLEMENTAL": Script(
        "train",
        "Zyyy",
        (
            "Supplemental Mathematical Operators",
            "Miscellaneous Mathematical Symbols-A",
            "Miscellaneous Mathematical Symbols-B",
        ),
    ),
    "TECHNICAL": Script("train", "Zyyy", ("Miscellaneous Technical",)),
    "GEOMETRIC": Script("train", "Zyyy", ("Geometric Shapes",)),
    "ARMENIAN": Script("val", "Armn"),
    "HEBREW": Script("val", "Hebr"),
    "OGHAM": Script("val", "Ogam"),
    "DINGBATS": Script("val", "Zyyy", ("Dingbats",)),
    "SYMBOLS": Script("val", "Zyyy", ("Miscellaneous Symbols",)),
    "I-CHING": Script("val", "Zyyy", ("Yijing Hexagram Symbols",)),
    "TAI-XUAN-JING": Script("val", "Zyyy", ("Tai Xuan Jing Symbols",)),
    "DOMINOES": Script("val", "Zyyy", ("Domino Tiles",)),
    "CANADIAN-ABORIGINAL": Script("test", "Cans"),
    "GEORGIAN": Script("test", "Geor", ("Georgian",)),
    "NUSKHURI": Script("test", "Geor", ("Georgian Supplement",)),
    "LAO": Script("test", "Laoo"),
    "ARABIC": Script("test", "Arab"),
    "TIFINAGH": Script("test", "Tfng"),
    "NKO": Script("test", "Nkoo"),
}


@cache
def coverage(face: str) -> frozenset[int]:
    """Code points that a face draws itself."""
    return frozenset(TTFont(FONTS / f"{face}.ttf").getBestCmap())


@cache
def font(face: str) -> ImageFont.FreeTypeFont:
    # The basic layout draws each character alone; the other would shape Arabic where it happens to be installed.
    return ImageFont.truetype(str(FONTS / f"{face}.ttf"), POINTS, layout_engine=ImageFont.Layout.BASIC)


def faces_of(codepoint: int) -> tuple[str, ...]:
    return tuple(face for face in FACES if codepoint in coverage(face))


def script_of(codepoint: int) -> str | None:
    code, block = unicode_tables.script(codepoint), unicode_tables.block(codepoint)
    for name, script in SCRIPTS.items():
        if code == script.code and (not script.blocks or block in script.blocks):
            return name
    return None


def is_candidate(codepoint: int) -> bool:
    """Whether a character has a shape of its own: no mark, blank or control, and no composition of other characters."""
    char = chr(codepoint)
    whole = unicodedata.category(char)[0] not in "CMZ" and unicodedata.normalize("NFKD", char) == char
    return whole and len(faces_of(codepoint)) >= 2


def ink(codepoint: int, face: str) -> Image.Image | None:
    """The drawn character (ink 255) cut to its box, or None if nothing is drawn."""
    mask, _ = font(face).getmask2(chr(codepoint), mode="L")
    box = mask.getbbox()
    if box is None:
        return None
    return Image.frombytes("L", mask.size, bytes(mask)).crop(box)


def shape_of(codepoint: int) -> np.ndarray | None:
    """Box-normalised shape, zero mean and unit length [256], or None if there is none (blank, or a full rectangle)."""
    glyph = ink(codepoint, faces_of(codepoint)[0])
    if glyph is None:
        return None
    pixels = np.asarray(glyph.resize((16, 16), Image.Resampling.BOX), dtype=np.float64).ravel()
    if pixels.mean() > 0.95 * 255:  # bars of any length look alike once their sides are scaled at random
        return None
    pixels -= pixels.mean()
    return pixels / np.linalg.norm(pixels)


def select_classes() -> list[tuple[str, int]]:
    """(script, code point) of every class, scripts in the order of SCRIPTS: of look-alikes, the first met is kept."""
    by_script: dict[str, list[int]] = {name: [] for name in SCRIPTS}
    for codepoint in sorted(frozenset().union(*map(coverage, FACES))):
        script = script_of(codepoint)
        if script is not None and is_candidate(codepoint):
            by_script[script].append(codepoint)
    shapes = np.zeros((0, 256))
    classes: list[tuple[str, int]] = []
    for script, codepoints in by_script.items():
        kept = []
        for codepoint in codepoints:
            shape = shape_of(codepoint)
            if shape is not None and (shapes @ shape < SAME_SHAPE).all():
                shapes = np.vstack([shapes, shape])
                kept.append(codepoint)
        if len(kept) > CLASSES_PER_SCRIPT:  # spread evenly: neighbours in Unicode tend to be variants of one letter
            kept = [kept[i * len(kept) // CLASSES_PER_SCRIPT] for i in range(CLASSES_PER_SCRIPT)]
        classes += [(script, codepoint) for codepoint in kept]
    return classes


def template(codepoint: int, face: str) -> np.ndarray:
    """The character, centred, slightly blurred, its longest side LONGEST: float32 [TEMPLATE, TEMPLATE] in [0, 1]."""
    glyph = ink(codepoint, face)
    if glyph is None:
        raise SystemExit(f"{face} draws nothing for U+{codepoint:04X}")
    scale = LONGEST / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    canvas = Image.new("L", (TEMPLATE, TEMPLATE))
    resized = glyph.resize((width, height), Image.Resampling.BILINEAR)
    canvas.paste(resized, ((TEMPLATE - width) // 2, (TEMPLATE - height) // 2))
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(1.0)), dtype=np.float32) / 255


def affine_maps(random: np.random.RandomState, templates: np.ndarray) -> np.ndarray:
    """Random linear maps from character to image [N, 2, 2], shrunk where the character's box would leave the image."""
    count = len(templates)
    angle, shear = random.uniform(-0.25, 0.25, (2, count))
    scale = np.exp(random.uniform(0.05, 0.35, (count, 1)) + random.uniform(-0.2, 0.2, (count, 2)))
    rotation = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1).reshape(count, 2, 2)
    skew = np.tile(np.eye(2), (count, 1, 1))
    skew[:, 0, 1] = shear
    maps = rotation @ skew * scale[:, None, :]
    half = np.stack([(templates > 0.2).any(axis).sum(-1) / TEMPLATE for axis in (1, 2)], -1)  # box, in half-widths
    reach = (np.abs(maps) @ half[:, :, None]).max((1, 2))
    return maps * np.minimum(1.0, 0.9 / reach)[:, None, None]


def elastic_bend(random: np.random.RandomState, count: int) -> Tensor:
    """Smooth displacements in half-widths of the template, [N, 2 CANVAS, 2 CANVAS, 2], from 4x4 Gaussian ones."""
    coarse = torch.from_numpy(0.1 * random.standard_normal((count, 2, 4, 4)))
    return F.interpolate(coarse, (2 * CANVAS, 2 * CANVAS), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def warp(templates: np.ndarray, maps: np.ndarray, shift: np.ndarray, bend: Tensor) -> np.ndarray:
    """The templates [N, TEMPLATE, TEMPLATE] as warped on to the canvas, [N, CANVAS, CANVAS] in [0, 1]."""
    ticks = (torch.arange(2 * CANVAS, dtype=torch.float64) + 0.5 - CANVAS) / SIZE
    pixels = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1) - torch.from_numpy(shift)[:, None, None]
    grid = torch.einsum("nij,nyxj->nyxi", torch.from_numpy(np.linalg.inv(maps)), pixels) + bend
    doubled = F.grid_sample(torch.from_numpy(templates).double()[:, None], grid, align_corners=False)
    return F.avg_pool2d(doubled, 2)[:, 0].numpy()


def darker(canvas: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Ink or not, bool [N, CANVAS, CANVAS]; relative to the darkest pixels, as hairlines are faint at 28 pixels."""
    return canvas > threshold * np.quantile(canvas, 0.99, axis=(1, 2), keepdims=True).clip(0.3, 1.0)


def extents(drawn: np.ndarray) -> np.ndarray:
    """Longest side of the ink's box, in pixels [N]."""
    sides = [np.ptp(np.flatnonzero(image.any(axis))) + 1 for image in drawn for axis in (0, 1)]
    return np.reshape(sides, (-1, 2)).max(-1)


def cut(drawn: np.ndarray) -> np.ndarray:
    """The middle [SIZE, SIZE] of a drawn canvas, moved by as few pixels as keep all ink off the image's border."""
    corner = []
    for axis in (1, 0):
        inked = np.flatnonzero(drawn.any(axis))
        start = min(max((CANVAS - SIZE) // 2, inked[-1] + 2 - SIZE), inked[0] - 1)
        corner.append(min(max(start, 0), CANVAS - SIZE))
    return drawn[corner[0] : corner[0] + SIZE, corner[1] : corner[1] + SIZE]


def draw_class(codepoint: int) -> np.ndarray:
    """A character's images, bool [IMAGES_PER_CLASS, SIZE, SIZE], ink True; its faces take turns in random order."""
    random = np.random.RandomState([SEED, codepoint])
    faces = random.permutation(faces_of(codepoint))
    drawings = {face: template(codepoint, face) for face in faces}
    templates = np.stack([drawings[faces[i % len(faces)]] for i in range(IMAGES_PER_CLASS)])
    maps, bend = affine_maps(random, templates), elastic_bend(random, IMAGES_PER_CLASS)
    shift = random.uniform(-0.2, 0.2, (IMAGES_PER_CLASS, 2))
    threshold = random.uniform(0.22, 0.5, (IMAGES_PER_CLASS, 1, 1))
    for _ in range(6):  # the bend may still push ink past the border: those images are drawn smaller until they fit
        drawn = darker(warp(templates, maps, shift, bend), threshold)
        shrink = np.minimum(1.0, (SIZE - 2) / extents(drawn))
        if (shrink == 1).all():
            break
        maps = maps * shrink[:, None, None]
    return np.stack([cut(image) for image in drawn])


def build(classes: Sequence[tuple[str, int]]) -> dict[str, np.ndarray]:
    """The file's arrays: `bits` uint8 [classes, images, 4, SIZE] (ink 1), `names`, and each split's class indices.

    A byte holds eight pixels of a row; bytes are stored in vertical bands, top to bottom, as they compress better so.
    """
    images = np.stack([draw_class(codepoint) for _, codepoint in classes])
    arrays = {
        "bits": np.packbits(images, axis=-1).swapaxes(-1, -2),
        "names": np.array([f"{script}/{codepoint:04X}" for script, codepoint in classes]),
    }
    for split in ("train", "val", "test"):
        chosen = [i for i, (script, _) in enumerate(classes) if SCRIPTS[script].split == split]
        arrays[split] = np.array(chosen, dtype=np.int64)
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the bundled glyph data set from matplotlib's fonts.")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write; the fonts' licences go beside it")
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    classes = select_classes()
    np.savez_compressed(out, **build(classes))
    for licence in LICENCES:
        shutil.copyfile(FONTS / licence, out.parent / licence)
    for split in ("train", "val", "test"):
        scripts = [script for script, _ in classes if SCRIPTS[script].split == split]
        print(f"{split}: {len(scripts)} classes of {len(set(scripts))} scripts")
    print(f"{out}: {out.stat().st_size} bytes, {len(classes) * IMAGES_PER_CLASS} images")


if __name__ == "__main__":
    main()
