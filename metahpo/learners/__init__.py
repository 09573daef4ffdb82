"""Meta-learners, one a file."""

from metahpo.learners.anil import ANIL as ANIL
from metahpo.learners.base import Adapted as Adapted
from metahpo.learners.base import MetaLearner as MetaLearner
from metahpo.learners.boil import BOIL as BOIL
from metahpo.learners.cavia import CAVIA as CAVIA
from metahpo.learners.imaml import IMAML as IMAML
from metahpo.learners.linear_head import LinearHead as LinearHead
from metahpo.learners.maml import MAML as MAML
from metahpo.learners.maml_pp import MAMLPlusPlus as MAMLPlusPlus
from metahpo.learners.meta_curvature import MetaCurvature as MetaCurvature
from metahpo.learners.meta_sgd import MetaSGD as MetaSGD
from metahpo.learners.phase import Improvements as Improvements
from metahpo.learners.phase import Phase as Phase
from metahpo.learners.policy_maml import PolicyMAML as PolicyMAML
from metahpo.learners.proto_net import ProtoNet as ProtoNet
from metahpo.learners.reptile import Reptile as Reptile
from metahpo.learners.warp_maml import WarpMAML as WarpMAML
