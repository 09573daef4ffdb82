"""Solvers of the linear systems of implicit hypergradients, one a file."""

from metahpo.hypergrad.solvers.base import Product as Product
from metahpo.hypergrad.solvers.base import Solution as Solution
from metahpo.hypergrad.solvers.base import Solver as Solver
from metahpo.hypergrad.solvers.cg import CG as CG
from metahpo.hypergrad.solvers.fixed_point import FixedPoint as FixedPoint
from metahpo.hypergrad.solvers.neumann import Neumann as Neumann
from metahpo.hypergrad.solvers.nystrom import Nystrom as Nystrom
