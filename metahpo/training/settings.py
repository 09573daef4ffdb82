"""The settings of a training."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from typing_extensions import Self

from metahpo import torchrun
from metahpo.checks import plain
from metahpo.errors import ConfigArgumentError, did_you_mean, shown

# More would end the process: each takes memory, and the operating system has a limit.
MOST_THREADS = 1024


class _ByKeywords(type(BaseModel)):
    """Settings made in Python say what is wrong as all else does: in a line for each keyword, as a ConfigError."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            lines = []
            for e in error.errors():
                key = ".".join(map(str, e["loc"]))
                if e["type"] == "extra_forbidden":
                    lines.append(f"no setting {key!r}; {did_you_mean(key, cls.model_fields)}")
                else:
                    what = e["msg"].removeprefix("Value error, ").replace("Input should", "should")
                    lines.append(f"{key}: {what}, found {shown(e['input'])}" if key else what)
            raise ConfigArgumentError("\n".join(lines)) from None


class Settings(BaseModel, metaclass=_ByKeywords):
    """Base of all settings: frozen, and a key that does not exist is an error.

    Made in Python, they raise ConfigArgumentError with a line for each value that cannot be. NumPy's numbers are taken;
    no bool, text, NaN or infinity is taken for a number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_alone(cls, value: Any, info: ValidationInfo) -> Any:
        value = plain(value)
        kind = cls.model_fields[info.field_name or ""].annotation
        kinds = set(get_args(kind) or (kind,)) - {type(None)}
        # Other text pydantic itself refuses.
        taken = isinstance(value, bool) or (isinstance(value, str) and _reads_as_number(value))
        if taken and kinds <= {int, float}:
            raise ValueError("should be a number")
        if isinstance(value, float) and not math.isfinite(value) and kinds <= {int, float}:
            raise ValueError("should be finite")
        return value

    @classmethod
    def of(cls, **values: Any) -> Self:
        """The settings given as keywords; raises ConfigArgumentError with a line for each that cannot be."""
        return cls(**values)


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _remat(value: Any) -> Any:
    if value in ("none", "sqrt") or (type(value) is int and value >= 1):
        return value
    raise ValueError("should be none, sqrt or a number of steps of at least 1")


# How the outer gradient passes through the inner loop; the numbers are the same.
InnerGradientName = Annotated[
    Literal["reverse", "mixed"],
    Field(description="mixed: forward over reverse, a fraction of the memory; not for every layer"),
]
RematName = Annotated[
    int | str,
    BeforeValidator(_remat),
    Field(description="keep the state every N inner steps and compute the rest again; sqrt: N of their root"),
]


def _known_device(name: str) -> str:
    if name != "auto":
        try:
            kind = torch.device(name).type
        except RuntimeError:
            raise ValueError(f"{name!r} is not a torch device") from None
        if kind not in ("cpu", "cuda"):
            raise ValueError("should be auto, cpu or cuda")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError("this machine has no CUDA device")
    return name


DeviceName = Annotated[str, AfterValidator(_known_device), Field(description="auto, cpu, cuda, cuda:1, ...")]


def device_of(name: str) -> torch.device:
    """The device that "auto" stands for here; under torchrun "cuda" is each rank's own."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device, local = torch.device(auto if name == "auto" else name), torchrun.local_rank()
    if device.type == "cuda" and device.index is None and local is not None:
        return torch.device("cuda", local)
    return device


class TrainingSettings(Settings):
    """How the outer loop runs. An epoch is ``iterations`` updates, each from the mean gradient over ``tasks`` tasks."""

    epochs: int = Field(default=100, ge=1)
    iterations: int = Field(default=500, ge=1, description="outer updates an epoch")
    tasks: int = Field(default=8, ge=1, description="tasks a batch")
    optimizer: str = Field(default="Adam", description="any class of torch.optim")
    optimizer_args: dict[str, Any] = Field(default_factory=dict, description="its arguments other than lr")
    lr: float = Field(default=1e-3, gt=0, description="outer rate")
    min_lr: float | None = Field(
        default=None, ge=0, description="cosine annealing by epoch from lr down to it; null: constant"
    )
    clip_value: float | None = Field(default=None, gt=0, description="clamp each outer gradient entry to +- this")
    clip_norm: float | None = Field(default=None, gt=0, description="scale the outer gradient to at most this norm")
    val_tasks: int = Field(default=600, ge=2, description="fixed validation tasks after each epoch")
    test_tasks: int = Field(default=600, ge=2, description="fixed test tasks at the end")
    keep_best: int = Field(
        default=5, ge=1, description="checkpoints kept by validation score, and the size of the test ensemble"
    )
    engine: Literal["auto", "loop", "threads", "vmap", "trace", "graph"] = Field(
        default="auto", description="how a batch of tasks is run; auto times those that fit and says which it takes"
    )
    check: bool = Field(default=False, description="compare the engine's gradient with loop's before the first step")
    check_gradient: bool = Field(
        default=True, description="warn if the first task's outer gradient is not the slope of its loss; float64"
    )
    precision: Literal["float32", "tf32", "bf16"] = Field(
        default="float32",
        description="of the net: tf32 rounds the inputs of products (CUDA; no change on a CPU), bf16 is autocast",
    )
    device: DeviceName = "auto"
    threads: int | None = Field(
        default=None,
        ge=1,
        le=MOST_THREADS,
        description="torch's intra-op threads, on which rounding depends; null: torch's own number",
    )
    read_every: int = Field(default=10, ge=1, description="CUDA: steps between two looks at loss and finiteness")
    seed: int = Field(default=0, ge=0)

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        # adamw, AdamW, torch.optim.AdamW.
        name = name.removeprefix("torch.optim.")
        name = next((k for k in vars(torch.optim) if k[:1].isupper() and k.lower() == name.lower()), name)
        found = getattr(torch.optim, name, None)
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)) or found is torch.optim.Optimizer:
            kinds = [k for k, v in vars(torch.optim).items() if isinstance(v, type) and k != "Optimizer"]
            raise ValueError(f"torch.optim has no optimizer {name!r}; {did_you_mean(name, kinds)}")
        return name

    @field_validator("min_lr")
    @classmethod
    def _anneals_down(cls, rate: float | None, info: ValidationInfo) -> float | None:
        start = info.data.get("lr")
        if rate is not None and start is not None and rate > start:
            raise ValueError(f"should be at most lr, {start}")
        return rate

    def torch_device(self) -> torch.device:
        """The device that "auto" stands for here; under torchrun "cuda" is each rank's own."""
        return device_of(self.device)
