"""Meta-learners, one a file."""

from metahpo.learners.base import Adapted as Adapted
from metahpo.learners.base import MetaLearner as MetaLearner
from metahpo.learners.maml import MAML as MAML
from metahpo.learners.maml_pp import MAMLPlusPlus as MAMLPlusPlus
from metahpo.learners.phase import Improvements as Improvements
from metahpo.learners.phase import Phase as Phase
from metahpo.learners.policy_maml import PolicyMAML as PolicyMAML
