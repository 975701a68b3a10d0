"""Residual networks for small pictures."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut (He et al., 2015, arXiv:1512.03385).

    Example:
        >>> BasicBlock(8, 16, stride=2)(torch.rand(2, 8, 8, 8)).shape
        torch.Size([2, 16, 4, 4])
    """

    def __init__(self, n_in: int, n_out: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        same = stride == 1 and n_in == n_out
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def resnet18_cifar(n_classes: int = 10, *, n_in: int = 3) -> nn.Sequential:
    """Return a ResNet-18 for pictures of 32×32; 11.2 million parameters.

    Its first layer is a 3×3 convolution with stride 1, without pooling.

    Args:
        n_classes: number of outputs
        n_in: number of input channels
    """
    layers: list[nn.Module] = [nn.Conv2d(n_in, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    n_before = 64
    for n, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(n_before, n, stride=stride), BasicBlock(n, n)]
        n_before = n
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, n_classes))


class Residual(nn.Module):
    """Compute x + inner(x).

    Example:
        >>> Residual(nn.Identity())(torch.ones(1))
        tensor([2.])
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def resnet9(n_classes: int = 10, *, n_in: int = 3, width: int = 64, scale: float = 0.125) -> nn.Sequential:
    """Return David Page's ResNet-9 for fast CIFAR-10 training (DAWNBench, 2018); 6.6 million parameters at width 64.

    Args:
        n_classes: number of outputs
        n_in: number of input channels
        width: the layers have `width` × 1, 2, 4, 8 channels
        scale: the scores are multiplied by this factor
    """

    def two(n: int) -> Residual:
        return Residual(nn.Sequential(conv_bn(n, n), conv_bn(n, n)))

    return nn.Sequential(
        conv_bn(n_in, width),
        conv_bn(width, 2 * width, pool=True),
        two(2 * width),
        conv_bn(2 * width, 4 * width, pool=True),
        conv_bn(4 * width, 8 * width, pool=True),
        two(8 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, n_classes, bias=False),
        Scale(scale),
    )


def conv_bn(n_in: int, n_out: int, *, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(n_in, n_out, 3, 1, 1, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class Scale(nn.Module):
    """Multiply by a constant factor.

    Example:
        >>> Scale(.5)(torch.ones(1))
        tensor([0.5000])
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor
