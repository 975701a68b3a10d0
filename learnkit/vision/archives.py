"""Official archives of well-known datasets: their addresses, checksums and formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@dataclass(frozen=True)
class Remote:
    """One file: its name, its addresses, and its checksum ("md5:…" or "sha256:…"; None: unknown)."""

    file: str
    addresses: tuple[str, ...]
    checksum: str | None


@dataclass(frozen=True)
class Archive:
    """A dataset.

    Attributes:
        name: name of its folder
        remotes: files to download
        kind: "pictures" in folders, or "cifar10", "cifar100", "mnist", which are converted to folders of pictures
        classes: class names, if the archive does not contain them
    """

    name: str
    remotes: tuple[Remote, ...]
    kind: str = "pictures"
    classes: tuple[str, ...] = ()


def one(name: str, address: str, checksum: str, kind: str = "pictures") -> Archive:
    return Archive(name, (Remote(address.rpartition("/")[2], (address,), checksum),), kind)


def four(name: str, mirrors: tuple[str, ...], sums: tuple[str, str, str, str], classes: tuple[str, ...]) -> Archive:
    files = (f"{part}-{what}-ubyte.gz" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
    remotes = (
        Remote(file, tuple(f"{mirror}/{file}" for mirror in mirrors), f"md5:{md5}")
        for file, md5 in zip(files, sums, strict=True)
    )
    return Archive(name, tuple(remotes), "mnist", classes)


CLOTHES = ("T-shirt or top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@final
class URLs:
    """Datasets that `untar_data` knows.

    Checksums are those of the publishers; for Imagenette and MNIST, those that torchvision uses. CIFAR and CIFAR_100
    are the binary versions: the Python versions are pickles, which run code when they are read.
    """

    CIFAR = one(
        "cifar10",
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "md5:c32a1d4ab5d03f1284b67883e8d87530",
        "cifar10",
    )
    CIFAR_100 = one(
        "cifar100",
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "md5:03b5dce01913d631647c71ecec9e9cb8",
        "cifar100",
    )
    MNIST = four(
        "mnist",
        ("https://ossci-datasets.s3.amazonaws.com/mnist", "http://yann.lecun.com/exdb/mnist"),
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
        tuple("0123456789"),
    )
    FASHION_MNIST = four(
        "fashion-mnist",
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",),
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        CLOTHES,
    )
    IMAGENETTE = one(
        "imagenette2",
        "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2.tgz",
        "md5:fe2fc210e6bb7c5664d602c3cd71e612",
    )
    IMAGENETTE_320 = one(
        "imagenette2-320",
        "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz",
        "md5:3df6f0d01a2c9592104656642f5e78a3",
    )
    IMAGENETTE_160 = one(
        "imagenette2-160",
        "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
        "md5:e793b78cc4c9e9a4ccc0c1155377a412",
    )
