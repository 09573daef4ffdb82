"""Reinforcement learning: environments, policies, and what is made of their episodes."""

from metahpo.rl.advantages import advantages as advantages
from metahpo.rl.environment import Environment as Environment
from metahpo.rl.environment import Step as Step
from metahpo.rl.gym import Gym as Gym
from metahpo.rl.half_cheetah import HalfCheetahDirection as HalfCheetahDirection
from metahpo.rl.half_cheetah import HalfCheetahVelocity as HalfCheetahVelocity
from metahpo.rl.navigation import Navigation as Navigation
from metahpo.rl.navigation import best_return as best_return
from metahpo.rl.policy import GaussianPolicy as GaussianPolicy
from metahpo.rl.policy import log_prob as log_prob
from metahpo.rl.rollout import Rollout as Rollout
from metahpo.rl.rollout import roll_out as roll_out
