"""Where tasks come from."""

from metahpo.tasks.completion import ImageCompletion as ImageCompletion
from metahpo.tasks.episodes import Episodes as Episodes
from metahpo.tasks.labelled import LabelledImages as LabelledImages
from metahpo.tasks.minibatches import minibatches as minibatches
from metahpo.tasks.rollouts import RolloutTasks as RolloutTasks
from metahpo.tasks.shots import Imbalance as Imbalance
from metahpo.tasks.sinusoid import Sinusoid as Sinusoid
from metahpo.tasks.task import Task as Task
from metahpo.tasks.task import TaskSource as TaskSource
