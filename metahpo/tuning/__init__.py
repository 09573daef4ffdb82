"""Hyperparameters of one ordinary training, by gradient."""

from metahpo.tuning.base import Result as Result
from metahpo.tuning.base import Tuner as Tuner
from metahpo.tuning.cleaning import clean as clean
from metahpo.tuning.cleaning_result import Cleaned as Cleaned
from metahpo.tuning.data import Labelled as Labelled
from metahpo.tuning.data import load_digits as load_digits
from metahpo.tuning.decay import tune_decay as tune_decay
from metahpo.tuning.decay_result import Decay as Decay
from metahpo.tuning.distillation import DistillationTuner as DistillationTuner
from metahpo.tuning.distillation import distill as distill
from metahpo.tuning.distillation_settings import DistillationSettings as DistillationSettings
from metahpo.tuning.distilled import Distilled as Distilled
from metahpo.tuning.initial import reinitialised as reinitialised
from metahpo.tuning.rates import tune_rates as tune_rates
from metahpo.tuning.run import load_result as load_result
from metahpo.tuning.schedule import Rates as Rates
