"""From a config to the objects of a run."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from metahpo.config import (
    Conv4Settings,
    CustomLearner,
    CustomNet,
    CustomTasks,
    FolderSettings,
    GlyphsSettings,
    MAMLSettings,
    MLPSettings,
    OmniglotSettings,
    RunConfig,
    SinusoidSettings,
)
from metahpo.errors import ConfigError, DataError, MetaHPOError, NetError
from metahpo.learners import MAML, MAMLPlusPlus, MetaLearner
from metahpo.nets import MLP, Conv4
from metahpo.tasks import Episodes, LabelledImages, Sinusoid, Task, TaskSource
from metahpo.training.trainer import Trainer, seeded

SPLITS = ("train", "val", "test")


def build_tasks(config: RunConfig, splits: tuple[str, ...] = SPLITS) -> dict[str, TaskSource]:
    """The task source of each split; each is tried once, so that data which cannot serve is refused before any work."""
    data, seed = config.data, config.training.seed
    if isinstance(data, CustomTasks):
        sources = {split: _call(data.source, "data.source", split=split, seed=seed, **data.args) for split in splits}
        for split, source in sources.items():
            _check_source(source, data.source, split)
        return sources
    queries = {s: data.queries if s == "train" or data.eval_queries is None else data.eval_queries for s in splits}
    if isinstance(data, SinusoidSettings):
        return {s: Sinusoid(s, shots=data.shots, queries=queries[s], seed=seed) for s in splits}
    images, rotate = load_images(config), getattr(data, "rotate", False)
    device = config.training.torch_device()
    return {
        split: Episodes(
            images,
            split,
            ways=data.ways,
            shots=data.shots,
            queries=queries[split],
            seed=seed,
            rotate=rotate and split == "train",
            device=device,
        )
        for split in splits
    }


def load_images(config: RunConfig) -> LabelledImages:
    """The images that the config names."""
    data = config.data
    if isinstance(data, GlyphsSettings):
        from metahpo.tasks.glyphs import load_glyphs

        return load_glyphs()
    if isinstance(data, OmniglotSettings):
        from metahpo.tasks.omniglot import load_omniglot

        return load_omniglot(data.root, split=data.split, download=data.download)
    if isinstance(data, FolderSettings):
        from metahpo.tasks.images import load_image_folder

        return load_image_folder(data.root, size=data.size, channels=data.channels)
    raise ConfigError(f"data.source {data.source!r} holds no images")


def build_learner(config: RunConfig, example: Task) -> MetaLearner:
    """The learner for tasks like ``example`` (one task), its net initialised from the config's seed.

    Raises NetError if the net cannot take the inputs or its output does not fit the targets.
    """
    regression = example.query_y.is_floating_point()
    loss = F.mse_loss if regression else F.cross_entropy
    settings = config.learner
    with seeded(config.training.seed):
        net = build_net(config, example)
        check_net(net, example, config.net.name)
        if isinstance(settings, CustomLearner):
            learner = _call(settings.name, "learner.name", net, optional={"loss": loss}, **settings.args)
            if not isinstance(learner, MetaLearner):
                raise ConfigError(
                    f"learner.name: {settings.name} gave {type(learner).__name__}, expected a MetaLearner"
                )
            return learner
        kind = MAML if isinstance(settings, MAMLSettings) else MAMLPlusPlus
        return kind(net, loss=loss, **settings.model_dump(exclude={"name"}))


def build_net(config: RunConfig, example: Task) -> nn.Module:
    """The net for inputs and targets like ``example``'s."""
    shape = {"in_shape": tuple(example.support_x.shape[1:]), "out_features": _outputs(example)}
    settings = config.net
    if isinstance(settings, CustomNet):
        net = _call(settings.name, "net.name", optional=shape, **settings.args)
        if not isinstance(net, nn.Module):
            raise ConfigError(f"net.name: {settings.name} gave {type(net).__name__}, expected a torch.nn.Module")
        return net
    if isinstance(settings, MLPSettings):
        return MLP(**shape, hidden=settings.hidden)
    assert isinstance(settings, Conv4Settings)
    if len(shape["in_shape"]) != 3:
        raise NetError(f"net conv4 takes images [C, H, W]; the data gives {list(shape['in_shape'])}; choose mlp")
    return Conv4(**shape, filters=settings.filters, slope=settings.slope)


def check_net(net: nn.Module, example: Task, name: str) -> None:
    """Raises NetError unless ``net`` maps the task's inputs to outputs that fit its targets."""
    x, y = example.support_x.cpu(), example.support_y
    expected = [len(x), _outputs(example)]
    was_training = net.training
    try:
        with torch.no_grad():
            # In evaluation mode, so that the trial leaves running statistics alone.
            output = net.eval()(x)
    except Exception as error:
        raise NetError(f"net {name} fails on inputs {list(x.shape)}: {_brief(error)}") from error
    finally:
        net.train(was_training)
    found = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if found != expected:
        what = "values" if y.is_floating_point() else "ways"
        raise NetError(
            f"net {name} gives {found} for inputs {list(x.shape)}; expected {expected} ({expected[1]} {what})"
        )


def build_trainer(config: RunConfig, run_dir: str | Path, *, resume: bool = False) -> Trainer:
    """The trainer of a run, new or as its newest checkpoint left it."""
    tasks = build_tasks(config, ("train", "val"))
    learner = build_learner(config, tasks["train"].task(0))
    if resume:
        return Trainer.resume(run_dir, learner, tasks["train"], tasks["val"])
    return Trainer(learner, tasks["train"], tasks["val"], config.training, run_dir)


def _outputs(example: Task) -> int:
    y = example.support_y
    return y.shape[-1] if y.is_floating_point() else int(max(y.max(), example.query_y.max())) + 1


def _check_source(source: Any, name: str, split: str) -> None:
    if not isinstance(source, TaskSource):
        raise ConfigError(
            f"data.source: {name} gave {type(source).__name__} for split {split!r}, expected a TaskSource"
        )
    try:
        task = source.task(0)
    except MetaHPOError:
        raise
    except Exception as error:
        raise DataError(f"data.source {name}, split {split!r}: task 0 fails: {_brief(error)}") from error
    if not isinstance(task, Task):
        raise DataError(f"data.source {name}, split {split!r}: task(0) gave {type(task).__name__}, expected a Task")


def _call(name: str, key: str, *args: Any, optional: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Calls the user's MODULE:ATTRIBUTE; ``optional`` arguments are passed only if it takes them."""
    function = _import(name, key)
    try:
        taken = inspect.signature(function).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        kwargs = {**{k: v for k, v in (optional or {}).items() if k in taken or open_ended}, **kwargs}
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{key}: {name} cannot be called with {', '.join(kwargs) or 'nothing'}: {error}") from None
    except ValueError:
        pass  # No signature to check (a builtin): the call itself will tell.
    try:
        return function(*args, **kwargs)
    except MetaHPOError:
        raise
    except Exception as error:
        raise ConfigError(f"{key}: {name} failed: {_brief(error)}") from error


def _import(name: str, key: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(f"{key}: cannot import {module_name!r}: {_brief(error)}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ConfigError(f"{key}: {module_name!r} ({module.__file__}) has no function or class {attribute!r}")
    return found


def _brief(error: Exception) -> str:
    """The error in one line, with the place in the user's file that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
