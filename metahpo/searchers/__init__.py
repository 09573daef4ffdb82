"""Classic searchers over the same training loop."""

from metahpo.searchers.asha import ASHA as ASHA
from metahpo.searchers.base import History as History
from metahpo.searchers.base import Observation as Observation
from metahpo.searchers.base import Proposal as Proposal
from metahpo.searchers.base import Searcher as Searcher
from metahpo.searchers.bohb import BOHB as BOHB
from metahpo.searchers.executors import Processes as Processes
from metahpo.searchers.executors import Ray as Ray
from metahpo.searchers.grid import Grid as Grid
from metahpo.searchers.hyperband import Hyperband as Hyperband
from metahpo.searchers.outcome import Outcome as Outcome
from metahpo.searchers.random import Random as Random
from metahpo.searchers.records import TrialRecord as TrialRecord
from metahpo.searchers.space import Choice as Choice
from metahpo.searchers.space import Float as Float
from metahpo.searchers.space import Int as Int
from metahpo.searchers.space import Space as Space
from metahpo.searchers.study import Study as Study
from metahpo.searchers.successive_halving import SuccessiveHalving as SuccessiveHalving
from metahpo.searchers.trial import Trial as Trial
