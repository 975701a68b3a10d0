"""Wide ResNets (Zagoruyko & Komodakis, 2016, arXiv:1605.07146) as in fastai v1: residual branches are scaled by 0.2."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

RESIDUAL = 0.2  # fastai v1's factor for the residual branch


class WideBlock(nn.Module):
    """Batch norm, ReLU and convolution, twice, with a shortcut that starts after the first activation.

    Example:
        >>> WideBlock(16, 32, stride=2)(torch.rand(2, 16, 8, 8)).shape
        torch.Size([2, 32, 4, 4])
    """

    def __init__(self, n_in: int, n_out: int, *, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(n_in)
        self.conv1 = conv(n_in, n_out, stride=stride)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Sequential(nn.BatchNorm2d(n_out), nn.ReLU(inplace=True), conv(n_out, n_out))
        self.shortcut = nn.Identity() if n_in == n_out else conv(n_in, n_out, size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(x), inplace=True)
        return self.shortcut(x) + RESIDUAL * self.conv2(self.dropout(self.conv1(x)))


class WideResNet(nn.Module):
    """A Wide ResNet: `(batch, n_in, height, width)` -> `(batch, n_classes)`.

    Args:
        n_groups: number of groups of blocks
        n_blocks: number of blocks in each group
        n_classes: number of outputs
        width: how many times wider than a thin ResNet
        dropout: dropout probability in each block
        n_start: number of channels of the first convolution
        n_in: number of input channels

    Example:
        >>> WideResNet(n_groups=3, n_blocks=1, width=1)(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        n_groups: int,
        n_blocks: int,
        n_classes: int = 10,
        *,
        width: int = 1,
        dropout: float = 0.0,
        n_start: int = 16,
        n_in: int = 3,
    ) -> None:
        super().__init__()
        widths = [n_start, *(n_start * 2**i * width for i in range(n_groups))]
        layers: list[nn.Module] = [conv(n_in, n_start)]
        for i, (n_before, n) in enumerate(pairwise(widths)):
            layers.append(WideBlock(n_before, n, stride=2 if i else 1, dropout=dropout))
            layers += [WideBlock(n, n, dropout=dropout) for _ in range(n_blocks - 1)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], n_classes)]
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True), *head)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


def conv(n_in: int, n_out: int, *, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution without bias that keeps the size, initialized as in He et al. (2015)."""
    layer = nn.Conv2d(n_in, n_out, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    return layer


def wrn_22(n_classes: int = 10, *, dropout: float = 0.0, n_in: int = 3) -> WideResNet:
    """Return a WRN-22-6: 22 layers, six times as wide; 9.7 million parameters with 10 classes.

    Args:
        n_classes: number of outputs
        dropout: dropout probability in each block
        n_in: number of input channels
    """
    return WideResNet(n_groups=3, n_blocks=3, n_classes=n_classes, width=6, dropout=dropout, n_in=n_in)
