"""Hypergradients: the gradient of an outer loss in the hyperparameters of an inner training."""

from metahpo.hypergrad.base import Hypergradient as Hypergradient
from metahpo.hypergrad.base import InnerState as InnerState
from metahpo.hypergrad.base import OuterLoss as OuterLoss
from metahpo.hypergrad.base import Strategy as Strategy
from metahpo.hypergrad.check import Comparison as Comparison
from metahpo.hypergrad.check import check_hypergradient as check_hypergradient
from metahpo.hypergrad.finite_difference import FiniteDifference as FiniteDifference
from metahpo.hypergrad.forward import Forward as Forward
from metahpo.hypergrad.implicit import Implicit as Implicit
from metahpo.hypergrad.pes import PES as PES
from metahpo.hypergrad.solvers import CG as CG
from metahpo.hypergrad.solvers import FixedPoint as FixedPoint
from metahpo.hypergrad.solvers import Neumann as Neumann
from metahpo.hypergrad.solvers import Nystrom as Nystrom
from metahpo.hypergrad.solvers import Solution as Solution
from metahpo.hypergrad.solvers import Solver as Solver
from metahpo.hypergrad.unroll import Unroll as Unroll
