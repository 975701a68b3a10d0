"""What a classifier confuses, its largest losses and its accuracy by class; as numbers and as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from learnkit.data.fork_rng import unmoved
from learnkit.data.loaders import TensorLoader, in_order
from learnkit.data.random import transform_batch
from learnkit.learner import Learner
from learnkit.logs.plots import import_pyplot
from learnkit.vision.data import ImageDataBunch
from learnkit.vision.show import show_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RIGHT, WRONG = "#2a7d4f", "#b3261e"


class TopLoss(NamedTuple):
    """One sample with its prediction.

    Attributes:
        index: its index in the dataset
        loss: its loss
        predicted: the predicted class
        probability: the predicted probability of that class
        actual: its true class
        file: its file, if known
    """

    index: int
    loss: float
    predicted: str
    probability: float
    actual: str
    file: str | None


def interpret(learn: Learner, dl: Any = None) -> Interpretation:
    """Predict all of `dl`, and return an `Interpretation`. With several ranks, all of them must call this function.

    Args:
        learn: a trained Learner
        dl: loader; None: valid_dl

    Raises:
        TypeError: when the model is not a classifier
    """
    preds, targets, losses = learn.get_preds(dl, with_loss=True)
    if not isinstance(preds, Tensor) or preds.ndim != 2 or targets.is_floating_point() or targets.ndim != 1:
        raise TypeError(
            "interpret is for classification: expected predictions (samples, classes) and a class index for each "
            f"sample, got {tuple(preds.shape) if isinstance(preds, Tensor) else type(preds).__name__} and "
            f"{tuple(targets.shape)}."
        )
    return Interpretation(
        learn.data, learn.data.valid_dl if dl is None else dl, preds.float(), targets, losses, seed=learn.seed
    )


class Interpretation:
    """A classifier's predictions together with the targets; the same on every rank. Created by `interpret`.

    Attributes:
        preds: scores, float `(samples, classes)`, in dataset order, like targets and losses
        predicted: the class with the highest score, int64 `(samples,)`

    Example:
        >>> print(interpret(learn).accuracy_per_class())  # doctest: +SKIP
        {'cat': 0.71, 'dog': 0.83}
    """

    def __init__(
        self, data: Any, dl: Any, preds: Tensor, targets: Tensor, losses: Tensor, *, seed: int | None = None
    ) -> None:
        self.data, self.dl, self.preds, self.targets, self.losses = data, dl, preds, targets, losses
        self.seed = seed  # of the random numbers in the loader's transforms; None: the loader's own seed
        self.predicted = preds.argmax(1)
        self.classes = (
            [str(name) for name in data.classes]
            if data.classes is not None
            else [str(k) for k in range(preds.shape[1])]
        )

    def confusion_matrix(self) -> Tensor:
        """Return how many samples of each class (row) were predicted as each class (column).

        Returns:
            int64 `(classes, classes)`.
        """
        n = self.preds.shape[1]
        return torch.bincount(self.targets * n + self.predicted, minlength=n * n).view(n, n)

    def most_confused(self, least: int = 1) -> list[tuple[str, str, int]]:
        """Return the pairs of classes that were confused, most frequent first.

        Args:
            least: skip pairs that occur fewer times

        Returns:
            A list of (actual class, predicted class, how often).
        """
        matrix = self.confusion_matrix().fill_diagonal_(0)
        pairs = [(int(matrix[i, j]), int(i), int(j)) for i, j in (matrix >= max(1, least)).nonzero().tolist()]
        return [
            (self.classes[i], self.classes[j], n) for n, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))
        ]

    def accuracy_per_class(self) -> dict[str, float]:
        """Return the fraction of correct predictions for each class; nan for a class without samples."""
        matrix = self.confusion_matrix().double()
        shares = matrix.diagonal() / matrix.sum(1)
        return dict(zip(self.classes, shares.tolist(), strict=False))

    def top_losses(self, k: int = 9) -> list[TopLoss]:
        """Return the `k` samples with the largest losses, largest first."""
        losses, indices = self.losses.topk(min(k, len(self.losses)))
        return [self.sample(int(i), float(loss)) for loss, i in zip(losses, indices, strict=True)]

    def sample(self, index: int, loss: float) -> TopLoss:
        predicted, actual = int(self.predicted[index]), int(self.targets[index])
        probability = float(self.preds[index].softmax(0)[predicted])
        return TopLoss(index, loss, self.classes[predicted], probability, self.classes[actual], self.file_of(index))

    def file_of(self, index: int) -> str | None:
        if not isinstance(self.data, ImageDataBunch):
            return None
        uses = {"train": self.data.train_dl, "valid": self.data.valid_dl, "test": self.data.test_dl}
        files = next(
            (
                self.data.pictures[use].files
                for use, loader in uses.items()
                if loader is self.dl and use in self.data.pictures
            ),
            [],
        )
        return files[index] if index < len(files) else None

    # --- as pictures ---------------------------------------------------------
    def plot_confusion_matrix(self, *, normalize: bool = False) -> Figure:
        """Plot the confusion matrix.

        Args:
            normalize: show the fractions of each row instead of numbers of samples
        """
        matrix = self.confusion_matrix().double()
        shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
        n = len(matrix)
        side = max(4.0, 0.42 * n + 1.6)
        figure, ax = import_pyplot().subplots(figsize=(side, side), layout="constrained")
        ax.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        names = [name[:18] for name in self.classes[:n]]
        ax.set_xticks(range(n), names, rotation=90, fontsize=8)
        ax.set_yticks(range(n), names, fontsize=8)
        ax.set(xlabel="predicted", ylabel="actual")
        for i in range(n if n <= 40 else 0):  # numbers in more cells would be too small to read
            for j in range(n):
                text = f"{shares[i, j]:.2f}" if normalize else f"{int(matrix[i, j])}"
                if matrix[i, j]:
                    ax.text(
                        j,
                        i,
                        text,
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if shares[i, j] > 0.5 else "black",
                    )
        return figure

    def plot_top_losses(self, k: int = 12, columns: int = 4) -> Figure:
        """Show the pictures with the largest losses: predicted class, actual class and loss.

        Args:
            k: number of pictures
            columns: number of columns of pictures
        """
        worst = self.top_losses(k)
        titles = [f"{t.predicted} {t.probability:.0%}\nactual: {t.actual}, loss {t.loss:.2f}" for t in worst]
        colours = [RIGHT if t.predicted == t.actual else WRONG for t in worst]
        return show_grid(self.pictures([t.index for t in worst]), titles, columns, colours=colours)

    def show_results(self, rows: int = 3, columns: int = 6) -> Figure:
        """Show pictures from the whole dataset: the predicted class, and the actual class if it differs.

        Args:
            rows: number of rows of pictures
            columns: number of columns of pictures
        """
        n = len(self.targets)
        indices = torch.linspace(0, n - 1, min(rows * columns, n)).round().long()
        right = self.predicted == self.targets
        titles = [
            self.classes[self.predicted[i]] + ("" if right[i] else f"\nactual: {self.classes[self.targets[i]]}")
            for i in indices
        ]
        return show_grid(
            self.pictures(indices.tolist()), titles, columns, colours=[RIGHT if right[i] else WRONG for i in indices]
        )

    def pictures(self, indices: list[int]) -> Tensor:
        """Return pictures as the model saw them, but not normalized: float `(n, channels, height, width)` in [0, 1]."""
        loader = in_order(self.dl)
        with unmoved():
            return self.pictures_of(loader, indices)

    def pictures_of(self, loader: Any, indices: list[int]) -> Tensor:
        if isinstance(loader, TensorLoader):
            x, seed = loader.tensors[0][indices], loader.sampler.seed if self.seed is None else self.seed
            x = transform_batch(x, loader.batch_tfms, seed, 0, lambda: torch.tensor(indices, device=x.device))
        else:
            x = torch.stack([next_of(loader, index) for index in indices])
        return self.data.denormalize(x) if isinstance(self.data, ImageDataBunch) else x.float().cpu().clamp(0, 1)


def next_of(loader: Any, index: int) -> Tensor:
    """Return the index-th picture of a loader of batches in order; this reads all batches before it."""
    n_before = 0
    for batch in loader:
        x = batch[0]
        if index < n_before + len(x):
            return x[index - n_before]
        n_before += len(x)
    raise IndexError(f"sample {index} does not exist: the loader has {n_before} samples.")
