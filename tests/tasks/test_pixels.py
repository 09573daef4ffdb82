"""Images of every mode, depth and type against Pillow and NumPy by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from metahpo.errors import DataError
from metahpo.tasks import Episodes, LabelledImages
from metahpo.tasks.datasets import labelled
from metahpo.tasks.images import load_image_folder

RANDOM = np.random.RandomState(0)
GREY = RANDOM.randint(0, 256, (4, 6), dtype=np.uint8)
COLOUR = RANDOM.randint(0, 256, (4, 6, 3), dtype=np.uint8)
ALPHA = RANDOM.randint(0, 256, (4, 6), dtype=np.uint8)
DEEP = RANDOM.randint(0, 65536, (4, 6), dtype=np.uint16)


def over_white(colour: np.ndarray) -> np.ndarray:
    share = ALPHA.reshape(ALPHA.shape + (1,) * (colour.ndim - 2)) / 255
    return share * colour + (1 - share) * 255


def palette(transparent: int | None = None) -> Image.Image:
    image = Image.fromarray(GREY % 4, mode=None).convert("P")
    image.putdata((GREY % 4).ravel().tolist())
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


PALETTE = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]])[GREY % 4]
CLEARED = np.where((GREY % 4 == 1)[..., None], 255, PALETTE)
# Each with the file that holds it, and its pixels [H, W] or [H, W, 3].
PICTURES = {
    "grey": (Image.fromarray(GREY), "png", GREY),
    "colour": (Image.fromarray(COLOUR), "png", COLOUR),
    "one bit": (Image.fromarray(GREY > 99), "png", (GREY > 99) * 255),
    "16-bit png": (Image.fromarray(DEEP), "png", DEEP / 257),
    "16-bit tiff": (Image.fromarray(DEEP), "tif", DEEP / 257),
    "32 bits of 16": (Image.fromarray(DEEP.astype(np.int32)), "tif", DEEP / 257),
    "32 bits of 8": (Image.fromarray(GREY.astype(np.int32)), "tif", GREY),
    "float fractions": (Image.fromarray(DEEP.astype(np.float32) / 65535), "tif", DEEP / 257),
    "float pixels": (Image.fromarray(GREY.astype(np.float32)), "tif", GREY),
    "grey and alpha": (Image.fromarray(np.dstack([GREY, ALPHA])), "png", over_white(GREY)),
    "colour and alpha": (Image.fromarray(np.dstack([COLOUR, ALPHA])), "png", over_white(COLOUR)),
    "alpha in webp": (Image.fromarray(np.dstack([COLOUR, ALPHA])), "webp", over_white(COLOUR)),
    "palette": (palette(), "png", PALETTE),
    "palette with a clear colour": (palette(1), "png", CLEARED),
    "cmyk": (Image.fromarray(COLOUR).convert("CMYK"), "tif", COLOUR),
}


def folder(root, image: Image.Image, suffix: str, **options):
    """A data set of that one image, and of others that no test looks at."""
    for split in ("train", "val", "test"):
        (root / split / "a").mkdir(parents=True)
        image.save(root / split / "a" / f"{split}.{suffix}", **options)
    return root


@pytest.mark.filterwarnings("ignore:.*copies of images")
@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_of_any_kind_holds_what_its_numbers_say(tmp_path, kind, channels):
    image, suffix, pixels = PICTURES[kind]
    lossless = {"lossless": True, "exact": True} if suffix == "webp" else {}
    # Square, so that nothing is resized.
    image, pixels = image.crop((0, 0, 4, 4)), pixels[:, :4]
    found = load_image_folder(folder(tmp_path, image, suffix, **lossless), size=4, channels=channels).images[0].numpy()
    if pixels.ndim == 2:
        pixels = pixels[..., None].repeat(channels, -1)
    elif channels == 1:
        pixels = pixels @ np.array([0.299, 0.587, 0.114])[:, None]
    assert np.abs(found.transpose(1, 2, 0) - pixels).max() <= 1.01, "rounding once or twice"


@pytest.mark.filterwarnings("ignore:.*copies of images")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_tag_says(tmp_path, orientation):
    # As the standard words it: where the picture's row 0 and column 0 are.
    turned = {
        1: COLOUR,
        2: COLOUR[:, ::-1],
        3: COLOUR[::-1, ::-1],
        4: COLOUR[::-1],
        5: COLOUR.transpose(1, 0, 2),
        6: COLOUR[::-1].transpose(1, 0, 2),
        7: COLOUR[::-1, ::-1].transpose(1, 0, 2),
        8: COLOUR.transpose(1, 0, 2)[::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(COLOUR).save(path, exif=exif)
    with Image.open(path) as image:
        found = labelled([(image, 0)]).images[0]
    assert torch.equal(found, torch.from_numpy(turned.copy()).permute(2, 0, 1))


def array(values) -> np.ndarray:
    return np.array(values)[None].repeat(2, 0).reshape(2, 2, 2)


@pytest.mark.parametrize(
    ("item", "seen"),
    [
        (torch.tensor([[[0, 51], [102, 255]]], dtype=torch.uint8), [0, 0.2, 0.4, 1]),
        (torch.tensor([[[0, 0.2], [0.4, 1]]]), [0, 0.2, 0.4, 1]),
        (torch.tensor([[[0.0, 51], [102, 255]]]), [0, 0.2, 0.4, 1]),
        (torch.tensor([[[0, 0.2], [0.4, 1]]], dtype=torch.float64), [0, 0.2, 0.4, 1]),
        (torch.tensor([[[-2, 0.5], [1.5, 3]]]), [-2, 0.5, 1.5, 3]),
        (torch.tensor([[[0, 51], [102, 255]]]), [0, 0.2, 0.4, 1]),
        (torch.tensor([[[0, 13107], [26214, 65535]]], dtype=torch.uint16), [0, 0.2, 0.4, 1]),
        (torch.tensor([[[0, 13107], [26214, 65535]]]), [0, 0.2, 0.4, 1]),
        (torch.tensor([[[False, True], [True, False]]]), [0, 1, 1, 0]),
        (np.array([[0, 51], [102, 255]], np.uint8), [0, 0.2, 0.4, 1]),
        (np.array([[0, 13107], [26214, 65535]], ">u2"), [0, 0.2, 0.4, 1]),
        (np.array([[[0], [0.2]], [[0.4], [1]]]), [0, 0.2, 0.4, 1]),
        (np.array([[[0, 255], [0, 0]], [[102, 255], [0, 51]]], np.uint8), [0, 1, 0.4, 0.8]),
    ],
)
def test_a_task_shows_an_item_of_any_type_in_its_own_range(item, seen):
    source = Episodes.from_dataset([(item, 0), (item, 0)], {"train": [0]}, "train", ways=1, shots=1, queries=1)
    found = source.task(0).support_x
    assert found.dtype == torch.float32
    assert found.shape == (1, 1, 2, 2)
    assert found.flatten().tolist() == pytest.approx(seen, abs=1e-7)


def test_float_images_are_not_divided_again():
    images = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    data = LabelledImages(images, torch.tensor([0, 0, 1, 1]), ("a", "b"), {"train": (0, 1)})
    task = Episodes(data, "train", ways=2, shots=1, queries=1).task(0)
    for x in torch.cat([task.support_x, task.query_x]):
        assert any(torch.equal(x, image) for image in images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_images_that_are_resized_keep_their_type_and_range(dtype):
    # Smooth: where Lanczos overshoots, Pillow cuts 8 bits off between its two passes.
    pixels = np.add.outer(np.arange(8), np.arange(8)).astype(np.uint8) * 10 + 50
    values = torch.from_numpy(pixels)[None].double() / 255
    values = values if dtype.is_floating_point else (values * 65535).round()
    data = labelled([(values.to(dtype), 0)], size=5)
    expected = np.array(Image.fromarray(pixels).resize((5, 5), Image.Resampling.LANCZOS))
    found = data.images[0, 0].double() * (255 if dtype.is_floating_point else 1)
    assert data.images.dtype == (torch.float32 if dtype.is_floating_point else torch.uint8)
    assert np.abs(found.numpy() - expected).max() <= 1.01


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.tensor([[[0, 70000]]]), "found whole numbers from 0 to 70000, expected 0 to 255"),
        (torch.tensor([[[0, -1]]]), "found whole numbers from -1 to 0"),
        (torch.tensor([[[0.5, 2.5]]]), "found values from 0.5 to 2.5, expected 0 to 255"),
        (torch.tensor([[[0.5, torch.nan]]]), "NaN or infinite"),
        (torch.zeros(1, 2, 2, dtype=torch.complex64), "found torch.complex64"),
        (torch.zeros(28, 28, 3), r"item 0 of the dataset is torch.float32 \[28, 28, 3\]; expected"),
        (np.array([["a"]]), r"item 0 of the dataset is <U1 \[1, 1\]; expected"),
        ("x.png", "item 0 of the dataset is str; expected"),
    ],
)
def test_values_that_are_no_picture_are_refused_in_a_line(item, message):
    with pytest.raises(DataError, match=message) as caught:
        labelled([(item, 0)])
    assert "\n" not in str(caught.value)


def test_items_of_two_types_are_refused():
    items = [(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 2, 2, dtype=torch.uint8), 0)]
    with pytest.raises(DataError, match=r"item 1 of the dataset is torch\.uint8, item 0 torch\.float32"):
        labelled(items)


def test_float_files_beyond_what_they_can_mean_are_named(tmp_path):
    root = folder(tmp_path, Image.fromarray(np.full((4, 4), 300.5, np.float32)), "tif")
    with pytest.raises(DataError, match=r"train\.tif: found values from 300.5 to 300.5, expected 0 to 255"):
        load_image_folder(root, size=4)


def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(tmp_path):
    frames = [Image.fromarray(np.full((4, 4, 3), shade, np.uint8)) for shade in (200, 10)]
    root = folder(tmp_path, frames[0], "webp", save_all=True, append_images=frames[1:], lossless=True)
    with pytest.warns(UserWarning, match=r"3 image files hold several frames, of which the first is taken, such as"):
        images = load_image_folder(root, size=4).images
    assert (images == 200).all()
