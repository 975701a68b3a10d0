"""Networks for pictures."""

from learnkit.vision.models.resnet import resnet9 as resnet9
from learnkit.vision.models.resnet import resnet18_cifar as resnet18_cifar
from learnkit.vision.models.wrn import WideResNet as WideResNet
from learnkit.vision.models.wrn import wrn_22 as wrn_22
