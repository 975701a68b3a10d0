"""Data sets fetched from a server on this machine, verified, unpacked nowhere else, resumed, and taken from local
files.
"""

import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from learnkit.checkpoint.files import Damaged
from learnkit.vision import ImageDataBunch, URLs, download, untar_data
from learnkit.vision.archives import Archive, Remote
from learnkit.vision.extract import extract
from tests.vision.conftest import make_folder


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; counts requests; ends a connection after `cut` bytes as often as `n_cuts` says."""

    files: dict[str, bytes]
    ranges: bool = True
    cut: int = 0
    n_cuts: int = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.n_bytes = {}, [], 0

    def address(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        data, start = self.server.files.get(self.path[1:]), 0
        self.server.requests.append(self.headers.get("Range"))
        if data is None:
            return self.send_error(404, "not here")
        if self.server.ranges and (wish := self.headers.get("Range")):
            start = int(wish.removeprefix("bytes=").rstrip("-"))
            self.send_response(416 if start >= len(data) else 206)
            self.send_header(
                "Content-Range",
                f"bytes */{len(data)}" if start >= len(data) else f"bytes {start}-{len(data) - 1}/{len(data)}",
            )
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(max(0, len(data) - start)))
        self.end_headers()
        data = data[start:]
        if self.server.n_cuts:
            data, self.server.n_cuts = data[: self.server.cut], self.server.n_cuts - 1
        self.server.n_bytes += len(data)
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def tar_of(folder: Path, kind: str = "gz", inside: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as file:
        file.add(folder, arcname=inside or ".")
    return buffer.getvalue()


def archive_of(server: Server, data: bytes, checksum: str | None = None, name: str = "tiny.tgz") -> Archive:
    server.files[name] = data
    return Archive(
        "tiny", (Remote(name, (server.address(name),), checksum or f"sha256:{hashlib.sha256(data).hexdigest()}"),)
    )


@pytest.fixture
def tiny(server: Server, tmp_path: Path) -> Archive:
    return archive_of(server, tar_of(make_folder(tmp_path / "source"), inside="tiny"))


def same_files(a: Path, b: Path) -> bool:
    def contents(top: Path) -> dict[str, bytes]:
        return {str(f.relative_to(top)): f.read_bytes() for f in top.rglob("*") if f.is_file()}

    return contents(a) == contents(b) != {}


def test_an_archive_is_downloaded_once_and_unpacked(server, tiny, tmp_path):
    first = untar_data(tiny, tmp_path / "root")
    assert first == tmp_path / "root/tiny" and same_files(first, tmp_path / "source")
    assert untar_data(tiny, tmp_path / "root") == first and len(server.requests) == 1
    assert [p.name for p in sorted((tmp_path / "root").rglob("*")) if p.is_file() and p.suffix != ".png"] == [
        ".tiny.lock"
    ], "something was left behind"
    assert len(ImageDataBunch.from_folder(first, bs=4).train_dl) == 3


@pytest.mark.parametrize("ranges", [True, False], ids=["with ranges", "without ranges"])
def test_an_interrupted_download_goes_on_where_the_server_lets_it(server, tiny, tmp_path, ranges):
    size = len(server.files["tiny.tgz"])
    server.ranges, server.cut, server.n_cuts = ranges, size // 2, 1
    assert same_files(untar_data(tiny, tmp_path / "root"), tmp_path / "source")
    assert server.requests == [None, f"bytes={size // 2}-"] and server.n_bytes == (size if ranges else size + size // 2)


def test_what_an_earlier_process_fetched_is_not_fetched_again(server, tiny, tmp_path):
    data = server.files["tiny.tgz"]
    part = tmp_path / "root/.downloads/tiny.tgz.part"
    part.parent.mkdir(parents=True)
    for known in (data[:100], data):
        part.write_bytes(known)
        server.n_bytes = 0
        folder = untar_data(tiny, tmp_path / "root")
        assert same_files(folder, tmp_path / "source") and server.n_bytes == len(data) - len(known)
        folder.rename(tmp_path / f"moved{len(known)}")


def test_a_part_of_another_file_is_noticed_and_fetched_anew_by_the_next_address(server, tiny, tmp_path):
    [remote] = tiny.remotes
    twice = Archive("tiny", (Remote(remote.file, remote.addresses * 2, remote.checksum),))
    part = tmp_path / "root/.downloads/tiny.tgz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 100)
    assert same_files(untar_data(twice, tmp_path / "root"), tmp_path / "source")


def test_a_connection_that_always_ends_early_is_given_up(server, tiny, tmp_path):
    server.cut, server.n_cuts = 10, 99
    with pytest.raises(OSError, match=r"the connection was lost 5 times before the file was complete"):
        untar_data(tiny, tmp_path / "root")
    assert (tmp_path / "root/.downloads/tiny.tgz.part").stat().st_size == 50


@pytest.mark.parametrize("checksum", ["md5:" + "0" * 32, "sha256:" + "0" * 64])
def test_another_file_than_the_pinned_one_is_refused_and_removed(server, tiny, tmp_path, checksum):
    wrong = archive_of(server, server.files["tiny.tgz"], checksum)
    with pytest.raises(OSError, match=rf"the {checksum[:3]}.* of .* bytes is [0-9a-f]+, expected 0+"):
        untar_data(wrong, tmp_path / "root")
    assert not (tmp_path / "root/tiny").exists() and not list((tmp_path / "root").rglob("*.tgz*"))


def test_the_second_address_is_asked_where_the_first_one_fails(server, tiny, tmp_path):
    [remote] = tiny.remotes
    mirrored = Archive("tiny", (Remote(remote.file, (server.address("gone.tgz"), *remote.addresses), remote.checksum),))
    assert same_files(untar_data(mirrored, tmp_path / "root"), tmp_path / "source")


def test_without_a_network_the_error_says_what_to_do(server, tmp_path):
    nobody = Archive("tiny", (Remote("tiny.tgz", ("http://127.0.0.1:9/tiny.tgz",), "md5:abc"),))
    with pytest.raises(
        OSError,
        match=r"tiny could not be downloaded: http://127.0.0.1:9/tiny.tgz: .*refused.*Without a network, copy tiny.tgz "
        r"\(md5:abc\) from "
        r"another machine into .*root; or pass an archive or a "
        r"folder.*archive='/path/to/it'.*LEARNKIT_DATA=/path/to/it",
    ):
        untar_data(nobody, tmp_path / "root")


def test_an_archive_that_somebody_put_there_needs_no_network_and_stays(server, tiny, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/tiny.tgz").write_bytes(server.files["tiny.tgz"])
    assert same_files(untar_data(tiny, tmp_path / "root"), tmp_path / "source")
    assert not server.requests and (tmp_path / "root/tiny.tgz").exists()


@pytest.mark.parametrize("where", ["argument", "variable", "folder of data sets"])
@pytest.mark.parametrize("kind", ["tar", "tgz", "tar.xz", "zip", "folder"])
def test_a_local_archive_or_folder_is_taken_instead(server, tmp_path, monkeypatch, where, kind):
    source = make_folder(tmp_path / "local/cifar10", parts=("train", "test"))
    local = tmp_path / f"local/cifar10.{kind}"
    if kind == "folder":
        local = source
    elif kind == "zip":
        with zipfile.ZipFile(local, "w") as file:
            for path in source.rglob("*.png"):
                file.write(path, path.relative_to(source.parent))
    else:
        local.write_bytes(
            tar_of(source, {"tar": "", "tgz": "gz", "tar.xz": "xz"}[kind], "some/where" if kind == "tgz" else "")
        )
    if kind != "folder":
        source = source.rename(tmp_path / "source")
    if where == "argument":
        found = untar_data(URLs.CIFAR, archive=local)
    else:
        monkeypatch.setenv("LEARNKIT_DATA", str(local if where == "variable" else local.parent))
        found = untar_data(URLs.CIFAR)
    assert same_files(found, source)  # also where other folders are around it


@pytest.mark.parametrize(
    "options, variable, message",
    [
        (
            {"archive": "gone.tgz"},
            None,
            r"gone.tgz does not exist: expected an archive \(.tar, .*\) or a folder of cifar10",
        ),
        ({}, "gone", r"LEARNKIT_DATA=gone does not exist: expected a folder or an archive of cifar10"),
    ],
)
def test_a_local_path_that_does_not_exist_is_said(options, variable, message, monkeypatch):
    if variable:
        monkeypatch.setenv("LEARNKIT_DATA", variable)
    with pytest.raises(FileNotFoundError, match=message):
        untar_data(URLs.CIFAR, **options)


def test_an_address_is_enough_with_or_without_a_checksum(server, tiny, tmp_path):
    data = server.files["tiny.tgz"]
    assert same_files(untar_data(server.address("tiny.tgz"), tmp_path / "a"), tmp_path / "source")
    assert same_files(
        untar_data(server.address("tiny.tgz"), tmp_path / "b", checksum=f"md5:{hashlib.md5(data).hexdigest()}"),
        tmp_path / "source",
    )
    with pytest.raises(ValueError, match="is not the address of an archive"):
        untar_data(server.address("tiny.jpg"))
    with pytest.raises(ValueError, match="is not an http or https address"):
        untar_data("file:///etc/tiny.tgz", tmp_path / "c")
    with pytest.raises(ValueError, match="expected 'sha256:…' or 'md5:…'"):
        untar_data(server.address("tiny.tgz"), tmp_path / "c", checksum="crc:1")


# --- archives that mislead ---------------------------------------------------
def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
    return info


HOSTILE = [
    (member("../evil"), "is outside"),
    (member("/tmp/evil"), "is outside"),
    (member("a/../../evil"), "is outside"),
    (member("..\\evil"), "is outside"),
    (member("C:/evil"), "is outside"),
    (member("link", tarfile.SYMTYPE, "/etc"), "a link to /etc"),
    (member("link", tarfile.SYMTYPE, ".."), "a link to .."),
    (member("link", tarfile.LNKTYPE, "../../evil"), "a link to ../../evil"),
    (member("pipe", tarfile.FIFOTYPE), "a device"),
    (member("disk", tarfile.BLKTYPE), "a device"),
]


@pytest.mark.parametrize("info, message", HOSTILE, ids=[info.name + info.linkname for info, _ in HOSTILE])
def test_a_tar_that_climbs_out_is_refused_and_nothing_of_it_stays(info, message, tmp_path):
    bad = tmp_path / "bad.tar"
    with tarfile.open(bad, "w") as file:
        file.addfile(member("train/a/fine.png"), io.BytesIO(b"data"))
        file.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(Damaged, match=f"bad.tar contains .*{message}.*nothing was"):
        untar_data(URLs.CIFAR, tmp_path / "root", archive=bad)
    assert (
        not list(tmp_path.rglob("evil"))
        and not Path("/tmp/evil").exists()
        and not list((tmp_path / "root").rglob("fine.png"))
    )


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil"])
def test_a_zip_that_climbs_out_is_refused(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as file:
        file.writestr(name, "evil")
    with pytest.raises(Damaged, match="is outside of its folder"):
        extract(tmp_path / "bad.zip", tmp_path / "out")
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as file:
        file.writestr(info, "/etc")
    with pytest.raises(Damaged, match="contains link, a link"):
        extract(tmp_path / "link.zip", tmp_path / "out")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"<html>no such file</html>",
        lambda data: b"",
        lambda data: data[:200] + bytes(40) + data[240:],
    ],
    ids=["cut off", "html", "empty", "zeros"],
)
@pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
def test_a_damaged_archive_is_refused_and_leaves_nothing(spoil, kind, tmp_path):
    bad = tmp_path / f"bad.tar.{kind}"
    bad.write_bytes(spoil(tar_of(make_folder(tmp_path / "source", n=3), kind)))
    with pytest.raises(
        Damaged, match=rf"bad.tar.{kind} cannot be unpacked: .*It is not a .tar, .* file, or it is incomplete"
    ):
        untar_data(URLs.CIFAR, tmp_path / "root", archive=bad)
    assert [p.name for p in (tmp_path / "root").iterdir()] == [p.name for p in (tmp_path / "root").glob("*.lock")]


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(b"\x80\x02.")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(
        tar_of(tmp_path / "cifar-10-batches-py", inside="cifar-10-batches-py")
    )
    with pytest.raises(
        Damaged,
        match=r"contains pickles, which run code when they are read. Use the binary version, cifar-10-binary.tar.gz",
    ):
        untar_data(URLs.CIFAR, tmp_path / "root", archive=tmp_path / "cifar-10-python.tar.gz")


# --- the official formats, with a few made-up pictur -------------------------
def pixels_of(file: Path) -> torch.Tensor:
    image = Image.open(file)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size[::-1], -1).permute(2, 0, 1)


@pytest.mark.parametrize("source, n_labels", [(URLs.CIFAR, 1), (URLs.CIFAR_100, 2)])
def test_cifars_binary_records_become_folders_of_pictures(source, n_labels, tmp_path):
    raw, ten = tmp_path / "raw", n_labels == 1
    raw.mkdir()
    names = [f"class{i}" for i in range(10)]
    (raw / ("batches.meta.txt" if ten else "fine_label_names.txt")).write_text("\n".join(names) + "\n\n")
    x = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    parts = {"train.bin" if not ten else "data_batch_1.bin": x[:4], ("test_batch.bin" if ten else "test.bin"): x[6:]}
    if ten:
        parts["data_batch_2.bin"] = x[4:6]
    for name, part in parts.items():
        (raw / name).write_bytes(
            b"".join(bytes([19] * (n_labels - 1) + [i]) + p.numpy().tobytes() for i, p in enumerate(part))
        )
    (tmp_path / "official.tar.gz").write_bytes(tar_of(raw, inside="inner"))
    folder = untar_data(source, tmp_path / "root", archive=tmp_path / "official.tar.gz")
    assert sorted(p.name for p in (folder / "train").iterdir()) == names
    assert torch.equal(pixels_of(folder / "train/class1/00001.png"), x[1]) and torch.equal(
        pixels_of(folder / "test/class2/00002.png"), x[8]
    )
    if ten:
        assert torch.equal(pixels_of(folder / "train/class0/00004.png"), x[4])


def test_mnists_four_files_become_folders_of_grey_pictures(server, tmp_path):
    x, remotes = torch.randint(0, 256, (5, 4, 6), dtype=torch.uint8), []
    for part, pixels in (("train", x[:3]), ("t10k", x[3:])):
        n = len(pixels).to_bytes(4, "big")
        for name, data in (
            (
                f"{part}-images",
                b"\0\0\x08\x03" + n + (4).to_bytes(4, "big") + (6).to_bytes(4, "big") + pixels.numpy().tobytes(),
            ),
            (f"{part}-labels", b"\0\0\x08\x01" + n + bytes(range(len(pixels)))),
        ):
            server.files[f"{name}.gz"] = gzip.compress(data)
            remotes.append(
                Remote(
                    f"{name}.gz",
                    (server.address(f"{name}.gz"),),
                    f"md5:{hashlib.md5(server.files[f'{name}.gz']).hexdigest()}",
                )
            )
    folder = untar_data(Archive("m", tuple(remotes), "mnist", ("zero", "one", "two")), tmp_path / "root")
    assert torch.equal(pixels_of(folder / "train/two/00002.png")[0], x[2]) and torch.equal(
        pixels_of(folder / "test/one/00001.png")[0], x[4]
    )
    assert not list((tmp_path / "root/.downloads").iterdir())


def test_checksums_are_those_that_torchvision_pins():
    from torchvision.datasets import MNIST, FashionMNIST, Imagenette

    for ours, theirs in ((URLs.MNIST, MNIST), (URLs.FASHION_MNIST, FashionMNIST)):
        assert [(r.file, r.checksum) for r in ours.remotes] == [(file, f"md5:{md5}") for file, md5 in theirs.resources]
    for ours, size in ((URLs.IMAGENETTE, "full"), (URLs.IMAGENETTE_320, "320px"), (URLs.IMAGENETTE_160, "160px")):
        assert (ours.remotes[0].addresses[0], ours.remotes[0].checksum) == (
            Imagenette._ARCHIVES[size][0],
            f"md5:{Imagenette._ARCHIVES[size][1]}",
        )


def fetch_in_child(source: Archive, root: str, queue) -> None:
    queue.put(str(untar_data(source, root)))


def test_of_several_processes_one_downloads(server, tiny, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=fetch_in_child, args=(tiny, str(tmp_path / "root"), queue)) for _ in range(3)]
    for child in children:
        child.start()
    assert {queue.get() for _ in children} == {str(tmp_path / "root/tiny")}
    for child in children:
        child.join()
    assert len(server.requests) == 1


def test_a_full_disk_is_said_with_the_need(server, tiny, tmp_path, monkeypatch):
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "copy", full)
    with pytest.raises(
        OSError,
        match=r"could not write .*tiny.tgz.part: No space left on device. It needs about .* MB; .* MB are free there. "
        r"Make room",
    ):
        untar_data(tiny, tmp_path / "root")


def test_unpacked_files_follow_the_umask(server, tiny, tmp_path):
    before = os.umask(0o027)
    try:
        folder = untar_data(tiny, tmp_path / "root")
    finally:
        os.umask(before)
    assert [oct(path.stat().st_mode & 0o777) for path in (folder, folder / "train", next(folder.rglob("*.png")))] == [
        "0o750",
        "0o750",
        "0o640",
    ]
