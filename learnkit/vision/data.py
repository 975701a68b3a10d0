"""ImageDataBunch: pictures in memory or read on demand, transformed batch by batch, normalized and shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from learnkit.checkpoint.files import as_path
from learnkit.data.loaders import (
    DataBunch,
    TensorLoader,
    check_batch_size,
    check_dataset,
    default_device,
    default_workers,
    first_batch,
)
from learnkit.data.random import BatchTransform
from learnkit.vision.folder import read_folder
from learnkit.vision.pictures import Pictures, free_memory, load_pictures
from learnkit.vision.samples import Numbered, SampleLoader
from learnkit.vision.transform import accepted, as_pair, normalize, to_float

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Stats = tuple[Sequence[float], Sequence[float]]
N_AHEAD = 3  # batches prepared ahead of time, if the pictures are not on the device that uses them


class ImageDataBunch(DataBunch):
    """Loaders of pictures. Batches are float `(batch, channels, height, width)`.

    Create one with `from_folder` or `from_dataset`.

    Attributes:
        pictures: {"train", "valid", "test"}: the decoded pictures and their files, if they are in memory
        stats: the (means, standard deviations) that batches are normalized with; None before `normalize`

    Example:
        >>> data = ImageDataBunch.from_folder("pets", size=64).normalize(imagenet_stats)  # doctest: +SKIP
    """

    def __init__(
        self,
        train_dl: Any,
        valid_dl: Any = None,
        test_dl: Any = None,
        *,
        loss_func: Callable[..., Tensor] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(train_dl, valid_dl, test_dl, loss_func=loss_func, classes=classes)
        self.pictures: dict[str, Pictures] = {}
        self.stats: Stats | None = None

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        train: str = "train",
        valid: str | None = "valid",
        test: str | None = None,
        *,
        ds_tfms: Any = None,
        size: int | tuple[int, int] | None = None,
        bs: int = 64,
        val_bs: int | None = None,
        n_channels: int = 3,
        on_error: str = "raise",
        cache: str | Path | None = "auto",
        drop_last: bool = True,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> ImageDataBunch:
        """Load the pictures of `path/train/<class>/…`, `path/valid/<class>/…` and `path/test/<class>/…`.

        They are decoded once by all cores, stored in a cache file, and read from it later.

        On an accelerator, pictures stay in its memory if they take at most a quarter of what is free there.
        Otherwise they are mapped from the cache file: a thread prepares batches ahead of time, which are copied from
        pinned memory. On a CPU they are always mapped. Without a cache file (`cache=None`, or a full disk) they are
        decoded into memory, of which they may take at most half of what is free. If a machine runs several processes,
        only one of them decodes, and all share the memory of the file.

        Args:
            path: folder of the dataset
            train: folder of the training set, relative to `path`
            valid: folder of the validation set, or None
            test: folder of the test set, or None
            ds_tfms: a pair of lists of transforms, for training and for the other sets; or one list, for training
            size: pixels, or (height, width). The shorter side is resized to it, and the middle is cut out. None: all
                pictures already have the same size
            bs: batch size for training
            val_bs: batch size for the other sets; None: `bs`
            n_channels: 3 for RGB, 1 for grey
            on_error: what to do with damaged pictures: "raise" an error with their names, or "skip" them with a warning
            cache: folder of the cache file. "auto": $LEARNKIT_CACHE, else ~/.cache/learnkit/pictures; None: decode
                again each time
            drop_last: whether training skips an incomplete last batch
            seed: seed of order and transforms
            device: None: the accelerator, else the CPU

        Raises:
            ValueError: when an argument is invalid, pictures are damaged, or their sizes differ
            FileNotFoundError: when a folder does not exist
            MemoryError: when the pictures do not fit into memory
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r}: expected 'raise' or 'skip'.")
        if n_channels not in (1, 3):
            raise ValueError(f"n_channels={n_channels}: expected 3 (RGB) or 1 (grey).")
        check_batch_size("bs", bs)
        names, pair = {"train": train, "valid": valid, "test": test}, None if size is None else as_pair("size", size)
        pictures: dict[str, Pictures] = {}
        for use, name in names.items():
            if name is None:
                continue
            folder = read_folder(as_path(path) / as_path(name), pictures["train"].classes if pictures else None)
            pictures[use] = load_pictures(folder, size=pair, n_channels=n_channels, on_error=on_error, cache=cache)
            check_size(pictures[use], pictures["train"], train, name)
        return cls.from_pictures(
            pictures, ds_tfms=ds_tfms, bs=bs, val_bs=val_bs, drop_last=drop_last, seed=seed, device=device
        )

    @classmethod
    def from_pictures(
        cls,
        pictures: dict[str, Pictures],
        *,
        ds_tfms: Any = None,
        bs: int = 64,
        val_bs: int | None = None,
        drop_last: bool = True,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> ImageDataBunch:
        """Create the loaders from pictures that are already in memory. Other arguments are as in `from_folder`.

        Args:
            pictures: the pictures under "train", "valid" and "test"
        """
        place = default_device() if device is None else torch.device(device)
        n_ahead = 0 if fits(sum(p.pixels.nbytes for p in pictures.values()), place) else N_AHEAD
        tfms = transforms_of(ds_tfms)

        def loader(use: str) -> TensorLoader | None:
            if use not in pictures:
                return None
            tensors = (pictures[use].pixels, pictures[use].labels)
            training = use == "train"
            own = TensorLoader(
                tensors,
                bs=bs if training else val_bs or bs,
                shuffle=training,
                drop_last=training and drop_last,
                seed=seed,
                batch_tfms=(*tfms[not training], to_float),
                n_ahead=n_ahead,
            )
            return own if place.type == "cpu" else own.to(place)

        data = cls(loader("train"), loader("valid"), loader("test"), classes=pictures["train"].classes)
        data.pictures = pictures
        return data

    @classmethod
    def from_dataset(
        cls,
        train_ds: Any,
        valid_ds: Any = None,
        test_ds: Any = None,
        *,
        ds_tfms: Any = None,
        bs: int = 64,
        val_bs: int | None = None,
        num_workers: int | None = None,
        drop_last: bool = True,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> ImageDataBunch:
        """Create the loaders from datasets of (picture, class), such as torchvision's.

        If the datasets are torchvision's, have no transforms and all pictures have one size, they are decoded once and
        held. With other datasets, `num_workers` processes make the samples again in each epoch, with the dataset's own
        transforms, seeded by (seed, epoch, sample). Other arguments are as in `from_folder`.

        Args:
            train_ds: training set
            valid_ds: validation set, or None
            test_ds: test set, or None
            ds_tfms: transforms of batches, as in `from_folder`; torchvision's transforms among them are applied to one
                picture at a time
            num_workers: number of worker processes; None: chosen automatically

        Raises:
            ValueError: when the pictures of one dataset differ in size
        """
        datasets = {
            name: ds for name, ds in (("train", train_ds), ("valid", valid_ds), ("test", test_ds)) if ds is not None
        }
        for dataset in datasets.values():
            check_dataset(dataset)
        if all(is_plain_dataset(dataset) for dataset in datasets.values()):
            pictures = {name: read_dataset(dataset, num_workers) for name, dataset in datasets.items()}
            return cls.from_pictures(
                pictures, ds_tfms=ds_tfms, bs=bs, val_bs=val_bs, drop_last=drop_last, seed=seed, device=device
            )
        place, tfms = default_device() if device is None else torch.device(device), transforms_of(ds_tfms)

        def loader(name: str) -> SampleLoader | None:
            if name not in datasets:
                return None
            training = name == "train"
            return SampleLoader(
                datasets[name],
                bs=bs if training else val_bs or bs,
                shuffle=training,
                drop_last=training and drop_last,
                batch_tfms=(*tfms[not training], to_float),
                device=place,
                seed=seed,
                num_workers=num_workers,
            )

        return cls(loader("train"), loader("valid"), loader("test"), classes=getattr(train_ds, "classes", None))

    def normalize(self, stats: Stats | None = None) -> ImageDataBunch:
        """Bring each channel to mean 0 and standard deviation 1: (x - mean) / std.

        Args:
            stats: (means, standard deviations) by channel; None: measured on the training pictures

        Returns:
            The ImageDataBunch itself.

        Raises:
            ValueError: when the data is already normalized, or the number of channels differs
        """
        if self.stats is not None:
            raise ValueError(f"the data is already normalized, with {self.stats}. Call normalize only once.")
        if stats is None:
            stats = self.measured_stats()
        last = normalize(*stats)
        n_channels, wanted = first_batch(self.train_dl)[0].shape[1], last.mean.numel()
        if wanted not in (1, n_channels):
            raise ValueError(
                f"the statistics have {wanted} channels, the pictures have {n_channels}: mnist_stats are for grey "
                f"pictures (n_channels=1), cifar_stats and imagenet_stats for RGB."
            )
        for loader in (self.train_dl, self.valid_dl, self.test_dl):
            if isinstance(loader, (TensorLoader, SampleLoader)):
                loader.batch_tfms = (*loader.batch_tfms[:-1], last)
        self.stats = stats
        return self

    def measured_stats(self) -> Stats:
        """Return (means, standard deviations) by channel of the training pictures, without their transforms.

        Raises:
            ValueError: when the pictures are not in memory
        """
        if "train" not in self.pictures:
            raise ValueError("these pictures are not in memory, so they cannot be measured: call normalize(stats).")
        pixels = self.pictures["train"].pixels
        sums, squares = torch.zeros(2, pixels.shape[1], dtype=torch.float64)
        for part in pixels.split(1024):
            part = part.double() / 255
            sums, squares = sums + part.sum((0, 2, 3)), squares + part.square().sum((0, 2, 3))
        n = pixels.numel() / pixels.shape[1]
        return (sums / n).tolist(), (squares / n - (sums / n).square()).sqrt().tolist()

    def denormalize(self, x: Tensor) -> Tensor:
        """Return a batch's pictures as they can be shown: float in [0, 1], on the CPU."""
        x = x.detach().float().cpu()
        return (x if self.stats is None else normalize(*self.stats).undo(x)).clamp(0, 1)

    def show_batch(self, rows: int = 4, columns: int = 6, *, train: bool = True) -> Figure:
        """Show the pictures of a batch, transformed, with their classes.

        Args:
            rows: number of rows of pictures
            columns: number of columns of pictures
            train: True: the next training batch; False: the first validation batch
        """
        from learnkit.vision.show import show_grid

        x, y = first_batch(self.train_dl if train else self.valid_dl)[:2]
        return show_grid(
            self.denormalize(x[: rows * columns]), [self.name_of(label) for label in y[: rows * columns]], columns
        )

    def name_of(self, label: Any) -> str:
        number = int(label)
        return str(self.classes[number]) if self.classes is not None else str(number)


def check_size(pictures: Pictures, of_train: Pictures, train: str, name: str) -> None:
    (height, width), wanted = pictures.pixels.shape[2:], tuple(of_train.pixels.shape[2:])
    if (height, width) != wanted:
        raise ValueError(
            f"the pictures of {name} are {height}×{width}, those of {train} are {wanted[0]}×{wanted[1]} (height × "
            f"width): pass size=…, such as size={wanted}, to resize all of them."
        )


def fits(n_bytes: int, device: torch.device) -> bool:
    """Return whether the pictures fit: in a quarter of the accelerator's free memory, or in half of the CPU's."""
    if device.type == "cpu":
        return n_bytes <= free_memory() / 2
    return n_bytes <= torch.accelerator.get_memory_info(device)[0] / 4


def transforms_of(ds_tfms: Any) -> tuple[tuple[BatchTransform, ...], tuple[BatchTransform, ...]]:
    """Return (transforms for training, transforms for the other sets)."""
    if ds_tfms is None:
        return (), ()
    if isinstance(ds_tfms, tuple) and len(ds_tfms) == 2 and all(isinstance(part, (list, tuple)) for part in ds_tfms):
        pair = ds_tfms
    elif isinstance(ds_tfms, Iterable):
        pair = (ds_tfms, ())
    else:
        raise TypeError(
            f"ds_tfms={ds_tfms!r}: expected a pair of lists of transforms, ([…], […]), for training and for the other "
            "sets."
        )
    first, second = (tuple(accepted(transform) for transform in part) for part in pair)
    return first, second


def is_plain_dataset(dataset: Any) -> bool:
    """Return whether a dataset is known to return the same samples each time."""
    known = type(dataset).__module__.startswith("torchvision.datasets.")
    return known and all(
        getattr(dataset, name, None) is None for name in ("transform", "target_transform", "transforms")
    )


def read_dataset(dataset: Any, num_workers: int | None) -> Pictures:
    """Read all of a dataset's pictures once, as uint8."""
    own: Any = Numbered(dataset, 0, 0)
    loader = DataLoader(
        own, batch_size=256, num_workers=default_workers(dataset) if num_workers is None else num_workers
    )
    try:
        parts = [(x, y) for x, y, _ in loader]
    except RuntimeError as error:
        if "stack expects each tensor to be equal size" not in str(error):
            raise
        raise ValueError(
            f"the pictures of {type(dataset).__name__} differ in size: give it a transform that resizes them, such as "
            f"torchvision.transforms.v2.Resize((64, 64))."
        ) from None
    files = [str(sample[0]) for sample in getattr(dataset, "samples", ())]
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    return Pictures(x, y, files, [str(name) for name in getattr(dataset, "classes", range(int(y.max()) + 1))])
