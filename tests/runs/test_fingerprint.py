"""What a run says when its data or its code are not what they were."""

from __future__ import annotations

import sys

import pytest
import torch

from metahpo.errors import ConfigError, DataError
from metahpo.runs.fingerprint import check_fingerprint, fingerprint, write_fingerprint
from metahpo.tasks import Episodes, LabelledImages, Sinusoid
from metahpo.tasks.identity import content_of, identity


def images(**changes) -> LabelledImages:
    pixels = torch.arange(8 * 16).reshape(8, 1, 4, 4).to(torch.uint8)
    given = {"images": pixels, "labels": torch.arange(8) // 2, "splits": {"train": (0, 1), "test": (2, 3)}}
    return LabelledImages(**{**given, **changes}, class_names=("a", "b", "c", "d"))


def of(data: LabelledImages, *splits: str) -> dict:
    return identity(content_of({split: Episodes(data, split, ways=2, shots=1, queries=1) for split in splits}))


def one_pixel() -> LabelledImages:
    pixels = images().images.clone()
    pixels[5, 0, 1, 1] += 1
    return images(images=pixels)


def swapped() -> LabelledImages:
    return images(images=images().images[[1, 0, *range(2, 8)]])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (one_pixel(), "the images have changed since the run began: found uint8 [8, 1, 4, 4], with other content"),
        (swapped(), "the images have changed"),
        (images(images=images().images / 255), "the images have changed since the run began: found float32 [8, 1, 4,"),
        (images(labels=torch.tensor([0, 1, 0, 1, 2, 2, 3, 3])), "the images of train by class have changed"),
        (images(splits={"train": (1, 0), "test": (2, 3)}), "the images of train by class have changed"),
    ],
)
def test_other_images_or_classes_are_refused_by_name(tmp_path, changed, expected):
    write_fingerprint(tmp_path, fingerprint({}, {}, of(images(), "train", "test")))
    # evaluate looks at one split alone.
    check_fingerprint(tmp_path, fingerprint({}, {}, of(images(), "test")))
    with pytest.raises(DataError) as raised:
        check_fingerprint(tmp_path, fingerprint({}, {}, of(changed, "train")))
    assert str(raised.value).startswith(f"data: {expected}") and "remove" in str(raised.value)


def test_tasks_of_ones_own_are_known_by_the_first_to_rounding(tmp_path):
    class Noisy(Sinusoid):
        def __init__(self, noise: float):
            super().__init__("train", shots=50, queries=5)
            self.noise = noise

        def task(self, index):
            task = super().task(index)
            return task._replace(support_x=task.support_x * (1 + self.noise))

    write_fingerprint(tmp_path, fingerprint({}, {}, identity(content_of({"train": Noisy(0)}))))
    check_fingerprint(tmp_path, fingerprint({}, {}, identity(content_of({"train": Noisy(1e-6)}))))
    with pytest.raises(DataError, match="data: the support_x of task 0 of train have changed"):
        check_fingerprint(tmp_path, fingerprint({}, {}, identity(content_of({"train": Noisy(1e-3)}))))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(70_000),
        torch.arange(5000).to(torch.uint8)[3:],
        torch.rand(300, 7, generator=torch.Generator().manual_seed(0)),
        torch.rand(3000, generator=torch.Generator().manual_seed(0)).bfloat16(),
        torch.tensor([True, False, True]),
        torch.tensor([1 + 2j, 3.0, 4j]),
    ],
)
def test_any_entry_and_any_order_counts(tmp_path, tensor):
    write_fingerprint(tmp_path, fingerprint({}, {}, identity({"x": tensor})))
    check_fingerprint(tmp_path, fingerprint({}, {}, identity({"x": tensor.clone()})))
    changed, places = tensor.clone(), len(tensor) // 2
    changed[places] = 0 if tensor.dtype != torch.bool else True
    for other in (changed, tensor.flip(0) if tensor.dtype != torch.bool else tensor[[1, 0, 2]]):
        with pytest.raises(DataError, match="data: the x have changed"):
            check_fingerprint(tmp_path, fingerprint({}, {}, identity({"x": other})))


def test_nothing_and_nan_are_as_they_were(tmp_path):
    parts = {"none": torch.zeros(0, 3), "one": torch.tensor(2.0), "nan": torch.tensor([torch.nan, 1.0])}
    for _ in range(2):
        write_fingerprint(tmp_path, fingerprint({}, {}, identity(parts)))
        check_fingerprint(tmp_path, fingerprint({}, {}, identity(parts)))


@pytest.fixture
def code(tmp_path, monkeypatch):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "own_named.py").write_text("import own_imported\n")
    (folder / "own_imported.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    __import__("own_named")
    yield folder
    for name in ("own_named", "own_imported"):
        sys.modules.pop(name)


def test_changed_code_of_the_user_is_said_and_goes_on(code, tmp_path, capsys):
    config = {"net": {"name": "own_named:Net"}}
    write_fingerprint(tmp_path, fingerprint(config, {}))
    check_fingerprint(tmp_path, fingerprint(config, {}))
    assert capsys.readouterr().err == ""
    (code / "own_imported.py").write_text("x = 2\n")
    check_fingerprint(tmp_path, fingerprint(config, {}))
    expected = "own_imported: the module has changed since the run began: figures may differ\n"
    assert capsys.readouterr().err == expected


def test_installed_modules_are_known_by_those_that_are_named_alone():
    assert set(fingerprint({"net": {"name": "yaml.nodes:Node"}}, {})["code"]) == {"yaml.nodes"}


def test_epochs_may_change_unless_the_rate_is_annealed_over_them(tmp_path):
    for rate in (None, 0.1):
        before, now = ({"training": {"epochs": epochs, "min_lr": rate}} for epochs in (2, 3))
        write_fingerprint(tmp_path, fingerprint(before, {}))
        if rate is None:
            check_fingerprint(tmp_path, fingerprint(now, {}))
        else:
            with pytest.raises(ConfigError, match=r"training\.epochs: .* \(training\.min_lr anneals the rate"):
                check_fingerprint(tmp_path, fingerprint(now, {}))
