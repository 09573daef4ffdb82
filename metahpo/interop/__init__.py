"""Other packages' optimisers, tasks and algorithms in metahpo's loops; each package is imported when it is used."""

from metahpo.interop.higher import HigherRule as HigherRule
from metahpo.interop.learn2learn import Learn2LearnLearner as Learn2LearnLearner
from metahpo.interop.tasksets import Learn2LearnTasks as Learn2LearnTasks
