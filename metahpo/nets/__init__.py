"""The nets of the papers; any ``nn.Module`` works in their place."""

from metahpo.nets.conv4 import Conv4 as Conv4
from metahpo.nets.mlp import MLP as MLP
from metahpo.nets.resnet12 import ResNet12 as ResNet12
from metahpo.nets.small_resnet import SmallResNet as SmallResNet
