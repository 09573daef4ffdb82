"""From the section ``data`` of a config to its tasks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from metahpo.building_rl import environment_of
from metahpo.config import RunConfig
from metahpo.config_data import (
    CIFAR100Settings,
    CustomTasks,
    DatasetSettings,
    DigitsPixelsSettings,
    FolderSettings,
    GlyphsSettings,
    OmniglotSettings,
    SinusoidSettings,
)
from metahpo.config_episodes import EpisodeSettings
from metahpo.config_learners import LinearHeadSettings
from metahpo.custom import call, check_source, reason
from metahpo.errors import ConfigError, DataError
from metahpo.tasks import Episodes, LabelledImages, RolloutTasks, Sinusoid, TaskSource
from metahpo.tasks.identity import content_of, identity
from metahpo.training.distributed import current
from metahpo.training.settings import TrainingSettings

SPLITS = ("train", "val", "test")


def build_tasks(
    config: RunConfig, splits: tuple[str, ...] = SPLITS, images: LabelledImages | None = None
) -> dict[str, TaskSource]:
    """The task source of each split; data which cannot serve is refused before any work.

    Your own source is tried with the first task and the last one that the config asks of it. images: those to draw
    from in place of the config's.
    """
    data, settings, seed = config.data, config.training, config.training.seed
    check_device(settings)
    if environment := environment_of(config):
        shape = {"episodes": data.episodes, "horizon": data.horizon}
        return {s: RolloutTasks(environment, s, seed=seed, **shape) for s in splits}
    if isinstance(data, CustomTasks):
        if taken := sorted({"split", "seed"} & set(data.args)):
            raise ConfigError(f"data.args.{taken[0]}: metahpo itself passes {taken[0]} to {data.source}; take it out")
        sources = {
            split: call(data.source, "data.source", {"split": split, "seed": seed, **data.args}) for split in splits
        }
        counts = {"train": settings.epochs * settings.iterations * settings.tasks}
        counts |= {"val": settings.val_tasks, "test": settings.test_tasks}
        for split, source in sources.items():
            check_source(source, f"data.source {data.source}, split {split!r}", counts[split])
        return sources
    queries = {s: data.queries if s == "train" or data.eval_queries is None else data.eval_queries for s in splits}
    if isinstance(data, SinusoidSettings):
        return {s: Sinusoid(s, shots=data.shots, queries=queries[s], seed=seed) for s in splits}
    if isinstance(data, DigitsPixelsSettings):
        from metahpo.tasks.completion import ImageCompletion, digits_by_split

        digits = digits_by_split()
        with under_key("data.shots"):
            return {
                s: ImageCompletion(
                    digits[s].to(settings.torch_device()), s, shots=data.shots, queries=queries[s], seed=seed
                )
                for s in splits
            }
    images, rotate = images or load_images(config.data), getattr(data, "rotate", False)
    images = replace(images, images=images.images.to(settings.torch_device()))
    by_class = isinstance(config.learner, LinearHeadSettings)
    tasks = {}
    for split in splits:
        with episode_keys(data, split):
            tasks[split] = Episodes(
                images,
                split,
                ways=data.shape(split)[0],
                shots=data.shape(split)[1],
                queries=queries[split],
                imbalance=data.uneven(),
                group=settings.tasks,
                seed=seed,
                rotate=rotate and split == "train",
                labels="class" if by_class and split == "train" else "task",
            )
    return tasks


def data_identity(config: RunConfig, tasks: Mapping[str, TaskSource]) -> dict[str, Any]:
    """The identity of the data behind some splits; empty where the config alone determines them."""
    given = isinstance(config.data, (CustomTasks, EpisodeSettings))
    return identity(content_of(tasks)) if given else {}


def load_images(data: Any) -> LabelledImages:
    """The images that a config's section ``data`` names."""
    if isinstance(data, GlyphsSettings):
        from metahpo.tasks.glyphs import load_glyphs

        return load_glyphs()
    if isinstance(data, OmniglotSettings):
        from metahpo.tasks.omniglot import load_omniglot

        with under_key("data.root"):
            return load_omniglot(data.root, split=data.split, download=data.download)
    if isinstance(data, FolderSettings):
        from metahpo.tasks.images import load_image_folder

        with under_key("data.root"):
            return load_image_folder(data.root, size=data.size, channels=data.channels)
    if isinstance(data, CIFAR100Settings):
        from metahpo.tasks.cifar import load_cifar_fs, load_fc100

        load = load_cifar_fs if data.source == "cifar_fs" else load_fc100
        with under_key("data.root"):
            return load(data.root, download=data.download)
    if isinstance(data, DatasetSettings):
        from metahpo.building_dataset import load_dataset

        return load_dataset(data)
    raise ConfigError(f"data.source {data.source!r} holds no images")


@contextmanager
def under_key(key: str) -> Iterator[None]:
    """Inside it an error of the data begins with the key of the config that it is about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    except OSError as error:
        raise DataError(f"{key}: {error.filename or ''}: {error.strerror or error}") from error


@contextmanager
def episode_keys(data: Any, split: str) -> Iterator[None]:
    """Inside it an error of ``Episodes`` names the key that its argument came from."""
    try:
        yield
    except DataError as error:
        found = re.match(r"(?:Episodes: )?(ways|shots|queries|imbalance|rotate)\b:? ?", str(error))
        if found is None:
            raise
        name, said = found[1], str(error)[found.end() :]
        evaluated = split != "train" and getattr(data, f"eval_{name}", None) is not None
        raise DataError(f"data.{'eval_' if evaluated else ''}{name}: {said}") from error


def check_device(settings: TrainingSettings) -> None:
    """Raises ConfigError if this machine cannot compute on the settings' device."""
    if settings.torch_device().type == "cuda" and ":" in settings.device and current().size > 1:
        raise ConfigError(
            f"training.device: found {settings.device!r}, expected auto or cuda: each rank takes a GPU of its own"
        )
    try:
        torch.ones(1, device=settings.torch_device()).item()
    except Exception as error:
        raise ConfigError(f"training.device: {settings.device!r} cannot be used here: {reason(error)}") from error
