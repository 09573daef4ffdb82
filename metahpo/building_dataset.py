"""From a config that names any data set of labelled images to its images."""

from __future__ import annotations

from torch.utils.data import Dataset

from metahpo.config_data import DatasetSettings
from metahpo.custom import brief, call
from metahpo.errors import ConfigError, DataError, did_you_mean
from metahpo.tasks.datasets import labelled
from metahpo.tasks.labelled import LabelledImages


def load_dataset(data: DatasetSettings) -> LabelledImages:
    """The images of the user's MODULE:FUNCTION, or of a torchvision dataset, called with the config's args."""
    dataset = call(data.dataset, "data.dataset", data.args) if ":" in data.dataset else _of_torchvision(data)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"data.dataset: {data.dataset} gave {type(dataset).__name__}, expected a Dataset with a length"
        )
    try:
        return labelled(dataset, size=data.size, channels=data.channels, fractions=data.fractions, seed=data.class_seed)
    except DataError as error:
        raise DataError(f"data.dataset {data.dataset}: {error}") from None
    except Exception as error:
        raise DataError(f"data.dataset: {data.dataset} cannot be read: {brief(error)}") from error


def _of_torchvision(data: DatasetSettings) -> Dataset:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(
            f"data.dataset: {data.dataset} needs torchvision, which is not installed: pip install 'metahpo[vision]' "
            "(MODULE:FUNCTION names a data set of your own)"
        ) from error
    kinds = [name for name, kind in vars(datasets).items() if isinstance(kind, type) and not name.startswith("_")]
    if data.dataset not in kinds:
        raise ConfigError(
            f"data.dataset: torchvision has no dataset {data.dataset!r}; {did_you_mean(data.dataset, kinds)}"
        )
    return call(f"torchvision.datasets:{data.dataset}", "data.dataset", data.args)
