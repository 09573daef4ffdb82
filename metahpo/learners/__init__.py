"""Meta-learners, one a file."""

from metahpo.learners.anil import ANIL as ANIL
from metahpo.learners.base import Adapted as Adapted
from metahpo.learners.base import MetaLearner as MetaLearner
from metahpo.learners.boil import BOIL as BOIL
from metahpo.learners.maml import MAML as MAML
from metahpo.learners.maml_pp import MAMLPlusPlus as MAMLPlusPlus
from metahpo.learners.meta_curvature import MetaCurvature as MetaCurvature
from metahpo.learners.meta_sgd import MetaSGD as MetaSGD
from metahpo.learners.phase import Improvements as Improvements
from metahpo.learners.phase import Phase as Phase
