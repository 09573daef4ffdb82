"""From a config to the objects of a run."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from metahpo import torchrun
from metahpo.building_data import SPLITS, build_tasks, load_images
from metahpo.building_learner import build_learner
from metahpo.config import RunConfig
from metahpo.config_learners import LinearHeadSettings
from metahpo.custom import brief, check_learner, reason
from metahpo.errors import CheckpointError, ConfigError, did_you_mean
from metahpo.learners import MetaLearner
from metahpo.run_dirs import check_begun
from metahpo.runs.fingerprint import may_change, why_not
from metahpo.tasks import LabelledImages, TaskSource
from metahpo.training.checkpoint import CheckpointStore
from metahpo.training.distributed import current
from metahpo.training.settings import TrainingSettings
from metahpo.training.trainer import Trainer


def build(
    config: RunConfig, splits: tuple[str, ...] = SPLITS, images: LabelledImages | None = None
) -> tuple[dict[str, TaskSource], MetaLearner]:
    """The tasks of each split and the learner of a run, all tried: what cannot work is refused before any work.

    All ranks of a run call it together; what cannot work on one stops all.
    """
    ranks = current()
    if ranks.size > 1 and getattr(config.data, "download", False):
        with ranks.agreed():
            if not torchrun.local_rank():  # One process a machine, lest several write the same file.
                load_images(config.data)
    with ranks.agreed():
        tasks = build_tasks(config, splits, images)
        learner = build_learner(config, tasks)
        check_optimizer(config.training, learner)
        check_learner(learner, config.learner.name, tasks["train"], next(reversed(tasks.values())), config.training)
    return tasks, learner


def build_for(config: RunConfig, split: str) -> tuple[TaskSource, MetaLearner]:
    """The tasks of one split, and the learner as it begins, to be given a run's weights."""
    # A linear head has as many outputs in training as there are classes.
    splits = ("train", split) if isinstance(config.learner, LinearHeadSettings) else (split,)
    tasks = build_tasks(config, splits)
    return tasks[split], build_learner(config, tasks)


def resume_trainer(
    config: RunConfig, run_dir: str | Path, splits: tuple[str, ...] = SPLITS, images: LabelledImages | None = None
) -> Trainer:
    """The trainer of the run in ``run_dir`` as its newest checkpoint left it."""
    tasks, learner = build(config, splits, images)
    store = CheckpointStore(Path(run_dir) / "checkpoints")
    ranks = current()
    if not ranks.on_first(store.list):
        # Killed before its first epoch was saved, the run has nothing to go on from and begins again.
        ranks.on_first(lambda: check_begun(Path(run_dir)))
        return Trainer(learner, tasks["train"], tasks["val"], config.training, run_dir)
    with ranks.agreed():
        path, state, _ = ranks.on_first(store.latest)
        _check_settings(config.training, state["settings"], path)
        if config.training.epochs < state["epoch"]:
            raise ConfigError(
                f"training.epochs: config.yaml says {config.training.epochs}, but {state['epoch']} are done; expected "
                "at least as many"
            )
        try:
            return Trainer.resume(run_dir, learner, tasks["train"], tasks["val"], config.training)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: cannot go on from it: {brief(error)}") from error


def check_optimizer(settings: TrainingSettings, learner: MetaLearner) -> None:
    """Raises ConfigError unless the settings' optimizer can be made and makes a step, tried on zeros."""
    name, args = settings.optimizer, settings.optimizer_args
    params = [torch.zeros_like(p, device=settings.torch_device()) for p in learner.outer_params().values()]
    if not params:
        raise ConfigError(f"learner.name: {type(learner).__name__} has no parameter to learn (that requires grad)")
    if taken := sorted({"lr", "params"} & set(args)):
        raise ConfigError(f"training.optimizer_args.{taken[0]}: should not be here; the rate is training.lr")
    kind = getattr(torch.optim, name)
    known = [k for k in inspect.signature(kind).parameters if k not in ("params", "lr")]
    for key in args:
        if key not in known:
            raise ConfigError(f"training.optimizer_args: {name} has no argument {key!r}; {did_you_mean(key, known)}")
    try:
        optimizer = kind([p.requires_grad_() for p in params], lr=settings.lr, **args)
    except Exception as error:
        where = f"optimizer_args: {name} refuses {args}" if args else f"optimizer: {name} cannot be used"
        raise ConfigError(f"training.{where}: {reason(error)}") from error
    for param in params:
        param.grad = torch.zeros_like(param)
    try:
        optimizer.step()
    except Exception as error:
        raise ConfigError(f"training.optimizer: {name} cannot train this learner: {reason(error)}") from error


def _check_settings(settings: TrainingSettings, trained: dict[str, Any], path: Path) -> None:
    """Raises ConfigError if config.yaml asks for other settings than the run was trained with."""
    asked = {f"training.{key}": value for key, value in settings.model_dump().items()}
    before = {f"training.{key}": value for key, value in trained.items()}
    lines = [
        f"{key}: config.yaml says {asked[key]!r}, but {path.name} was trained with {before[key]!r}{why_not(key)}; "
        "set it back, or train anew"
        for key in sorted(asked.keys() - may_change(asked))
        if key in before and before[key] != asked[key]
    ]
    if lines:
        raise ConfigError("\n".join(lines))
