"""The one inner loop, its update rules and its gradients."""

from metahpo.inner.gradient import FirstOrder as FirstOrder
from metahpo.inner.gradient import InnerGradient as InnerGradient
from metahpo.inner.gradient import Reverse as Reverse
from metahpo.inner.mixed import Mixed as Mixed
from metahpo.inner.problem import Fitted as Fitted
from metahpo.inner.problem import InnerProblem as InnerProblem
from metahpo.inner.problem import rule_hparams as rule_hparams
from metahpo.inner.remat import Every as Every
from metahpo.inner.remat import NoRemat as NoRemat
from metahpo.inner.remat import Remat as Remat
from metahpo.inner.remat import Sqrt as Sqrt
from metahpo.inner.remat import named_remat as named_remat
from metahpo.inner.rules import SGD as SGD
from metahpo.inner.rules import Adadelta as Adadelta
from metahpo.inner.rules import Adagrad as Adagrad
from metahpo.inner.rules import Adam as Adam
from metahpo.inner.rules import AdamW as AdamW
from metahpo.inner.rules import ByLayer as ByLayer
from metahpo.inner.rules import LayerStepRates as LayerStepRates
from metahpo.inner.rules import PerTensorRule as PerTensorRule
from metahpo.inner.rules import RMSprop as RMSprop
from metahpo.inner.rules import Scheduled as Scheduled
from metahpo.inner.rules import UpdateRule as UpdateRule
from metahpo.inner.unroll import Trajectory as Trajectory
from metahpo.inner.unroll import unroll as unroll
