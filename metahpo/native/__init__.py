"""C kernels for the CPU: the blocks of convolutional nets, twice differentiable."""

from metahpo.native.build import library as library
from metahpo.native.functions import conv2d as conv2d
from metahpo.native.functions import conv_taps as conv_taps
from metahpo.native.functions import norm_act_pool as norm_act_pool
