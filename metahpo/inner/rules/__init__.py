"""Differentiable update rules, one a file."""

from metahpo.inner.rules.adadelta import Adadelta as Adadelta
from metahpo.inner.rules.adagrad import Adagrad as Adagrad
from metahpo.inner.rules.adam import Adam as Adam
from metahpo.inner.rules.adam import AdamW as AdamW
from metahpo.inner.rules.base import PerTensorRule as PerTensorRule
from metahpo.inner.rules.base import UpdateRule as UpdateRule
from metahpo.inner.rules.by_layer import ByLayer as ByLayer
from metahpo.inner.rules.curvature import CurvatureRule as CurvatureRule
from metahpo.inner.rules.gauss_newton import GaussNewton as GaussNewton
from metahpo.inner.rules.layer_step_rates import LayerStepRates as LayerStepRates
from metahpo.inner.rules.lbfgs import LBFGS as LBFGS
from metahpo.inner.rules.levenberg_marquardt import LevenbergMarquardt as LevenbergMarquardt
from metahpo.inner.rules.newton import Newton as Newton
from metahpo.inner.rules.rmsprop import RMSprop as RMSprop
from metahpo.inner.rules.scheduled import Scheduled as Scheduled
from metahpo.inner.rules.sgd import SGD as SGD
