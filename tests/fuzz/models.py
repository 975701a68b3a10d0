"""Small models of each kind: what they keep, draw, share, leave unused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.fuzz.part import Part, part

WIDTH, CLASSES = 5, 3


class Residual(nn.Module):
    """A block, of which a model has several."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 6)
        self.blocks = nn.ModuleList([Residual(6, dropout) for _ in range(2)])
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Tied(nn.Module):
    """One matrix used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.down.weight = self.up.weight
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.down(torch.tanh(self.up(x))))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, CLASSES), nn.Linear(2, CLASSES)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.left(first) + torch.tanh(self.right(second))


class Unused(nn.Module):
    """A layer that no forward pass comes to."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(WIDTH, CLASSES), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Counting(nn.Module):
    """Buffers that training changes, a whole number and a float one, and one that is in no file."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("n_calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.ones(CLASSES))
        self.register_buffer("constant", torch.full((CLASSES,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.n_calls += 1
            self.scale *= 0.99
        return self.linear(x) * self.scale + self.constant


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.last = nn.GRU(1, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gru(x.unsqueeze(-1))[0][:, -1])


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout, batch_first=True)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(self.embed(x.unsqueeze(-1))).mean(1))


class Convolutions(nn.Module):
    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        # A bias before batch norm has a gradient of 0 but for rounding, which optimizers such as Adagrad enlarge.
        self.conv, self.norm = (
            nn.Conv2d(1, 4, 3, padding=1, bias=not norm),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
        )
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def frozen_first(model: nn.Sequential) -> nn.Sequential:
    for p in model[0].parameters():
        p.requires_grad_(False)
    return model


def halves(model: nn.Module) -> list[list[nn.Parameter]]:
    """A splitter: two layer groups."""
    parameters = list(model.parameters())
    return [parameters[:1], parameters[1:]]


# dropout     draws numbers in training, other ones on each rank
# batch norm  normalizes over a rank's batch
# pictures    takes (batch, 1, 6, 6); pair: two inputs; else (batch, WIDTH)
# unused      a parameter gets no gradient
# blocks      has submodules of the class Residual
# one matrix  fewer than two parameters, so that nothing is to be split
MODELS: dict[str, Part] = {
    "linear": part("nn.Linear(WIDTH, CLASSES)", weight=2),
    "MLP": part("nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, CLASSES))", weight=2),
    "MLP, dropout": part(
        "nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES))", "dropout", weight=3
    ),
    "batch norm": part(
        "nn.Sequential(nn.Linear(WIDTH, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))",
        "batch norm",
        weight=3,
    ),
    "batch norm, dropout": part(
        "nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 6), nn.Dropout(0.2), nn.Linear(6, CLASSES))",
        "batch norm",
        "dropout",
        weight=2,
    ),
    "blocks": part("Blocks()", "blocks", weight=2),
    "blocks, dropout": part("Blocks(dropout=0.2)", "blocks", "dropout"),
    "tied": part("Tied()"),
    "two inputs": part("TwoInputs()", "pair"),
    "unused": part("Unused()", "unused"),
    "frozen": part("frozen_first(nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES)))"),
    "buffers": part("Counting()"),
    "GRU": part("Recurrent()"),
    "transformer": part("Transformer()"),
    "transformer, dropout": part("Transformer(dropout=0.1)", "dropout"),
    "convolutions": part("Convolutions()", "pictures"),
    "convolutions, batch norm": part("Convolutions(norm=True)", "pictures", "batch norm"),
}
