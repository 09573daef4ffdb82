"""The training loop."""

from metahpo.training.ensemble import evaluate_run as evaluate_run
from metahpo.training.interrupts import Interrupted as Interrupted
from metahpo.training.settings import TrainingSettings as TrainingSettings
from metahpo.training.trainer import Trainer as Trainer
