"""Handwritten digits: a complete training script.

    python examples/01_digits.py            (or: make train)

The data are the 1,797 images of 8×8 pixels that come with scikit-learn; every fifth one is for validation.
Claim: 99.7 % validation accuracy (median of n = 7 seeds, 99.4 to 99.7 %), in about 3 seconds of training on two CPU
cores. Writes loss.png and lr.png to the current folder.
"""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn

from learnkit import DataBunch, Learner, accuracy

pixels, labels = load_digits(return_X_y=True)
x = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16  # (1797, 1, 8, 8) in [0, 1]
y = torch.tensor(labels)  # (1797,) in 0..9
valid = torch.arange(len(y)) % 5 == 0


def conv(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


torch.manual_seed(42)
data = DataBunch.from_tensors((x[~valid], y[~valid]), (x[valid], y[valid]), bs=64)
model = nn.Sequential(
    conv(1, 32), conv(32, 64), nn.MaxPool2d(2), conv(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
)
learn = Learner(data, model, metrics=accuracy)
learn.fit_one_cycle(12, 1e-2)

for name, plot in (("loss.png", learn.recorder.plot_losses), ("lr.png", learn.recorder.plot_lr)):
    plot()
    pyplot.savefig(name, dpi=120)
print(f"accuracy {learn.validate()['accuracy']:.4f}; wrote loss.png and lr.png")
