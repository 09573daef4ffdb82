"""Images of any mode, depth and type as the numbers that a net takes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metahpo.errors import DataArgumentError

MODES = {1: "L", 3: "RGB"}
# How a picture of each EXIF orientation is turned upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112


def picture_pixels(image: Image.Image) -> np.ndarray:
    """A Pillow image, upright by its EXIF tag, on white where it is transparent.

    Returns:
        uint8 [H, W] or [H, W, 3], from 16-bit greys too (65535 is 255). Modes "I" and "F" do not
        say what is white: they stay int32 or float32 [H, W], for ``scale_of`` to look at.
    """
    image.load()
    image = _upright(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _sixteen_bits(image)
    if image.mode in ("I", "F"):
        return np.array(image)
    grey = image.mode in ("1", "L", "LA", "La")
    if _transparent(image):
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.array(image.convert("L" if grey else "RGB"))


def several_frames(image: object) -> bool:
    """Whether a Pillow image is an animation or has several pages; False for anything else."""
    # The second picture of a telephone's is a preview or a map of brightness.
    return (
        isinstance(image, Image.Image)
        and getattr(image, "n_frames", 1) > 1
        and image.format != "MPO"
    )


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # What a damaged tag raises has no end, and the picture itself is whole.
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format
    return turned


def _transparent(image: Image.Image) -> bool:
    if image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A"):
        return True
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _sixteen_bits(image: Image.Image) -> np.ndarray:
    values = np.array(image).astype(np.int64)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        values[values == clear] = 65535
    return ((values + 128) // 257).astype(np.uint8)


def scale_of(low: float, high: float, whole: bool, what: str) -> float:
    """What the values of a whole set are to be multiplied by, so that white is 255.

    Args:
        low: The least value of all images.
        high: The largest.
        whole: Whether all are whole numbers.
        what: Whose they are, for the error.

    Raises:
        DataArgumentError: Unless they are fractions from 0 to 1, or whole numbers of 8 or 16 bits.
    """
    if 0 <= low <= high <= 1 and not whole:
        return 255.0
    if whole and 0 <= low <= high <= 65535:
        return 1.0 if high <= 255 else 1 / 257
    raise DataArgumentError(
        f"{what}: found {'whole numbers' if whole else 'values'} from {low:.6g} to {high:.6g}, expected "
        "0 to 255, whole numbers to 65535, or fractions from 0 to 1"
    )


def net_images(images: Tensor, what: str) -> Tensor:
    """Images [M, C, H, W] of any type as uint8, or as float32 that a net takes as they are.

    Whole numbers become uint8, those of more than 8 bits as 65535 is 255; so do floats that are
    whole numbers above 1. Fractions from 0 to 1, and normalised images (which have negative
    values), stay floats.

    Raises:
        DataArgumentError: For other ranges, values that are not finite, and complex numbers.
    """
    if images.dtype == torch.uint8 or not images.numel():
        return images
    if images.dtype == torch.bool:
        return images.to(torch.uint8) * 255
    if images.is_complex():
        raise DataArgumentError(f"{what}: found {images.dtype}, expected uint8 or floats")
    floats = images.is_floating_point()
    # Many types of whole numbers know no minimum.
    values = images.float() if floats else images.to(torch.int64)
    low, high = (float(bound) for bound in torch.aminmax(values))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataArgumentError(f"{what}: found values that are NaN or infinite, expected finite")
    if floats and (low < 0 or high <= 1):
        return values
    whole = not floats or bool((values == values.round()).all())
    factor = scale_of(low, high, whole, what)
    if factor == 1:
        return values.to(torch.uint8)
    return ((values.to(torch.int64) + 128) // 257).to(torch.uint8)


def resized(pixels: np.ndarray, side: tuple[int, int], channels: int) -> np.ndarray:
    """Pixels [H, W] or [H, W, 3] as [height, width, channels], by Lanczos and in their own type.

    side: (width, height). channels: 1 (grey) or 3.
    """
    if pixels.dtype == np.uint8:
        picture = Image.fromarray(pixels).convert(MODES[channels])
        if picture.size != side:
            picture = picture.resize(side, Image.Resampling.LANCZOS)
        return np.array(picture).reshape(side[1], side[0], channels)
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    if planes.shape[-1] != channels:
        # Pillow's own weights of red, green and blue.
        grey = planes @ np.array([0.299, 0.587, 0.114]) if channels == 1 else planes[..., 0]
        planes = np.stack([grey] * channels, -1)
    if (planes.shape[1], planes.shape[0]) != side:
        layers = [Image.fromarray(planes[..., c].astype(np.float32)) for c in range(channels)]
        planes = np.stack([np.array(p.resize(side, Image.Resampling.LANCZOS)) for p in layers], -1)
        # Lanczos overshoots at edges, beyond what the picture holds.
        planes = planes.clip(pixels.min(), pixels.max())
    if np.issubdtype(pixels.dtype, np.integer):
        planes = np.rint(planes)
    return planes.astype(pixels.dtype)
