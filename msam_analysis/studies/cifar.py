"""CIFAR-10 and CIFAR-100 from their published binary files, and generated files of the same format.

Nothing is downloaded, and nothing is unpickled: the "binary version (suitable for C programs)" of the data sets' home
page, https://www.cs.toronto.edu/~kriz/cifar.html, holds plain bytes. A record is one label byte (CIFAR-100: two, of the
superclass and of the class) and the 32×32 image's red, green and blue planes, 1,024 bytes each, row by row.

Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from msam_analysis.results import atomic_folder

Kind = Literal["cifar10", "cifar100"]
Checksum = Literal["published", "any"]

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_MOST_PACKED = 1100  # bytes that gzip can pack into one
_MARK = "GENERATED.txt"


@dataclass(frozen=True)
class _File:
    """One of the files: its name, its published number of records and its SHA-256."""

    name: str
    records: int
    sha256: str


@dataclass(frozen=True)
class _Format:
    """What is published as one data set. ``labels`` counts the classes of every label byte; the last one is learned."""

    archive: str
    md5: str
    folder: str
    labels: tuple[int, ...]
    train: tuple[_File, ...]
    test: _File

    @property
    def record(self) -> int:
        return len(self.labels) + _PIXELS

    @property
    def files(self) -> tuple[_File, ...]:
        return (*self.train, self.test)


# The archives' MD5 as on the home page. The home page gives none for the files in them: their SHA-256 is the one that
# the loader of the Ruby package torchvision checks.
_FORMATS: Mapping[str, _Format] = {
    "cifar10": _Format(
        archive="cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        folder="cifar-10-batches-bin",
        labels=(10,),
        train=(
            _File("data_batch_1.bin", 10_000, "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
            _File("data_batch_2.bin", 10_000, "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
            _File("data_batch_3.bin", 10_000, "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
            _File("data_batch_4.bin", 10_000, "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
            _File("data_batch_5.bin", 10_000, "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
        ),
        test=_File("test_batch.bin", 10_000, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
    ),
    "cifar100": _Format(
        archive="cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary",
        labels=(20, 100),
        train=(_File("train.bin", 50_000, "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29"),),
        test=_File("test.bin", 10_000, "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a"),
    ),
}


@dataclass(frozen=True, eq=False)
class Split:
    """Images ``(N, 3, 32, 32)``, uint8, red, green, blue, and what they show: ``(N,)``, int64; CIFAR-100's also above.

    CIFAR-100's images are views into the files' records, so that they are in memory once; indexing with a tensor and
    moving to another device make them contiguous.
    """

    images: Tensor
    labels: Tensor
    superclasses: Tensor | None


@dataclass(frozen=True, eq=False)
class Cifar:
    """A data set as it was read: 50,000 and 10,000 images, if they are the published ones.

    ``source``: The folder or the archive that was read.
    ``published``: Whether the bytes were checked to be the published ones. If not, a report should say so.
    ``sha256``: File name to the SHA-256 of its content.
    """

    kind: Kind
    train: Split
    test: Split
    classes: int
    source: Path
    published: bool
    sha256: Mapping[str, str]


def load(path: str | os.PathLike[str], kind: Kind = "cifar100", *, checksum: Checksum = "published") -> Cifar:
    """Read CIFAR-10 or CIFAR-100.

    Parameters
    ----------
    path
        The archive ``cifar-100-binary.tar.gz`` (``cifar-10-binary.tar.gz``), which is read in place; the folder that
        was extracted from it; or a folder that holds either, of which the extracted one is taken first.
    kind
        ``"cifar100"`` (default) or ``"cifar10"``.
    checksum
        ``"published"`` (default): the number of records must be the published one, and the content too, which is told
        from the MD5 of an archive and from the SHA-256 of every extracted file. ``"any"``: files of the same format of
        any number of images, such as :func:`generate` writes.

    Returns
    -------
    Cifar
        Images and labels on the CPU. CIFAR-100's are not copied once they are read; CIFAR-10's five training files are
        joined.

    Raises
    ------
    FileNotFoundError
        There is neither the folder nor the archive, or a file in it is missing.
    ValueError
        A size, a checksum or a label is wrong, the archive is damaged, or ``kind`` or ``checksum`` is unknown.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = generate(folder, train=200, test=100)
    ...     data = load(folder, checksum="any")
    >>> data.train.images.shape, data.test.labels.shape, data.published
    (torch.Size([200, 3, 32, 32]), torch.Size([100]), False)
    """
    layout = _layout(kind)
    if checksum not in ("published", "any"):
        raise ValueError(f"expected checksum 'published' or 'any', got {checksum!r}")
    source = _find(Path(path), layout)
    published = checksum == "published"
    read = _read_folder if source.is_dir() else _read_archive
    contents = read(source, layout, published)
    sums = {file.name: hashlib.sha256(contents[file.name]).hexdigest() for file in layout.files}
    for file in layout.files if published and source.is_dir() else ():  # an archive as a whole was checked
        if sums[file.name] != file.sha256:
            raise ValueError(
                f"{source / file.name} has the published size but other content (SHA-256 {sums[file.name]}): "
                f"extract {layout.archive} anew, or read it as it is with checksum='any'"
            )
    first, *rest, test = (_split(contents.pop(file.name), source, file, layout) for file in layout.files)
    if rest:  # only CIFAR-10 comes in several files, and it has no superclasses
        parts = (first, *rest)
        first = Split(torch.cat([one.images for one in parts]), torch.cat([one.labels for one in parts]), None)
    return Cifar(kind, first, test, layout.labels[-1], source, published, sums)


def generate(
    folder: str | os.PathLike[str], kind: Kind = "cifar100", *, train: int = 2000, test: int = 500, seed: int = 0
) -> Path:
    """Write files of CIFAR's format with synthetic images of classes that can be learned.

    Every class has a smooth random pattern of its own; an image is a random 32×32 window of its class's 40×40 pattern,
    mirrored or not, with noise in every pixel. They show a workload from end to end, and nothing about CIFAR.

    Parameters
    ----------
    folder
        Gets a folder ``cifar-100-binary`` (``cifar-10-batches-bin``) with the files and a note ``GENERATED.txt``;
        :func:`load` reads it with ``checksum="any"``.
    kind
        ``"cifar100"`` (default) or ``"cifar10"``.
    train, test
        Number of images, of all classes as evenly as possible, in random order. CIFAR-10's training images are spread
        over five files. Default 2,000 and 500.
    seed
        Of patterns and images. The superclass of class c is c // 5, which it is not in CIFAR-100.

    Returns
    -------
    pathlib.Path
        The folder with the files.

    Raises
    ------
    FileExistsError
        That folder is there already.
    ValueError
        There are fewer images than files, or ``kind`` is unknown.
    """
    layout = _layout(kind)
    target = Path(folder) / layout.folder
    if train < len(layout.train) or test < 1:
        raise ValueError(
            f"expected at least {len(layout.train)} training images and 1 test image, got {train} and {test}: "
            "every file must hold one"
        )
    if target.exists():
        raise FileExistsError(f"{target} exists already: remove it, or generate into another folder")
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.standard_normal((layout.labels[-1], 3, 5, 5)))
    patterns = F.interpolate(coarse, size=(40, 40), mode="bicubic").numpy()
    with atomic_folder(target) as partial:
        names = [[file.name for file in layout.train], [layout.test.name]]
        for count, files in zip((train, test), names, strict=True):
            labels = random.permutation(np.arange(count) % layout.labels[-1])
            for name, part in zip(files, np.array_split(labels, len(files)), strict=True):
                with (partial / name).open("wb") as stream:
                    for chunk in np.array_split(part, 1 + len(part) // 1000):
                        stream.write(_records(chunk, patterns, len(layout.labels), random).tobytes())
        (partial / _MARK).write_text(
            f"Synthetic images in the format of {layout.archive}, written by msam_analysis.studies.cifar.generate(kind="
            f"{kind!r}, train={train}, test={test}, seed={seed}). They are not CIFAR.\n"
        )
    return target


def _records(
    labels: NDArray[np.int64], patterns: NDArray[np.float64], label_bytes: int, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Return one record for every label, ``(N, label_bytes + 3072)``."""
    images = np.empty((len(labels), *_SHAPE))
    corners = random.integers(0, 9, (len(labels), 2))
    mirrored = random.integers(0, 2, len(labels)) * 2 - 1
    for image, label, (top, left), step in zip(images, labels, corners, mirrored, strict=True):
        image[...] = patterns[label, :, top : top + 32, left : left + 32][:, :, ::step]
    # Patterns and noise of about 40 grey levels each around the middle one.
    images = 128 + 40 * images + 40 * random.standard_normal(images.shape)
    columns = [labels // 5, labels][-label_bytes:]
    pixels = images.clip(0, 255).round().reshape(len(labels), _PIXELS)
    return np.concatenate([np.stack(columns, axis=1), pixels], axis=1).astype(np.uint8)


def _layout(kind: str) -> _Format:
    if kind not in _FORMATS:
        raise ValueError(f"expected the kind 'cifar10' or 'cifar100', got {kind!r}")
    return _FORMATS[kind]


def _find(path: Path, layout: _Format) -> Path:
    """Return the extracted folder or the archive that a path stands for."""
    if path.is_file():
        return path
    for folder in (path, path / layout.folder):
        if any((folder / file.name).is_file() for file in layout.files):
            return folder
    if (path / layout.archive).is_file():
        return path / layout.archive
    raise FileNotFoundError(
        f"expected {layout.archive}, or the folder {layout.folder} extracted from it, at {path}"
        f"{'' if path.exists() else ', which does not exist'}: get that archive from the data set's home page "
        "(the Python version, which is pickled, is not read)"
    )


def _check_size(name: str, size: int, file: _File, layout: _Format, published: bool) -> None:
    if published and size != file.records * layout.record:
        raise ValueError(
            f"{name} has {size:,} bytes, expected {file.records * layout.record:,} of the {file.records:,} published "
            f"images: extract {layout.archive} anew, or read other files of its format with checksum='any'"
        )
    if size == 0 or size % layout.record != 0:
        raise ValueError(
            f"{name} has {size:,} bytes, expected a multiple of {layout.record:,}, the bytes of one image and its "
            f"label{'s' * (len(layout.labels) - 1)}: pass files of the format of {layout.archive}"
        )


def _fill(stream: io.BufferedIOBase, size: int) -> bytearray:
    """Read so many bytes into memory that may be written to, without a second copy."""
    content = bytearray(size)
    done = stream.readinto(content)  # of a buffered stream: less only at its end
    if done < size:
        raise EOFError(f"ended after {done:,} of {size:,} bytes")
    return content


def _read_folder(folder: Path, layout: _Format, published: bool) -> dict[str, bytearray]:
    contents = {}
    for file in layout.files:
        path = folder / file.name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: extract all of {layout.archive}")
        with path.open("rb") as stream:
            size = path.stat().st_size
            _check_size(str(path), size, file, layout, published)
            contents[file.name] = _fill(stream, size)
    return contents


def _read_archive(path: Path, layout: _Format, published: bool) -> dict[str, bytearray]:
    """Return the content of the named files alone; everything else in the archive is passed over."""
    if published:
        md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        if md5 != layout.md5:
            raise ValueError(
                f"{path} has the MD5 {md5}, expected {layout.md5}, the published one of {layout.archive}: get it anew, "
                "or read another archive of its format with checksum='any'"
            )
    wanted = {f"{layout.folder}/{file.name}": file for file in layout.files}
    contents: dict[str, bytearray] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                file = wanted.get("/".join(PurePosixPath(member.name).parts[-2:]))
                if file is None or not member.isreg():
                    continue
                _check_size(f"{member.name} in {path}", member.size, file, layout, published)
                if member.size > _MOST_PACKED * path.stat().st_size:
                    raise EOFError(f"{member.name} claims {member.size:,} bytes, more than it can hold")
                contents[file.name] = _fill(cast(io.BufferedIOBase, archive.extractfile(member)), member.size)
    except (tarfile.TarError, EOFError, OSError, zlib.error, struct.error, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is not a whole .tar.gz archive ({error}): get {layout.archive} anew") from None
    missing = [file.name for file in layout.files if file.name not in contents]
    if missing:
        raise FileNotFoundError(f"{path} holds no {layout.folder}/{missing[0]}: pass {layout.archive}")
    return contents


def _split(content: bytearray, source: Path, file: _File, layout: _Format) -> Split:
    records = torch.frombuffer(content, dtype=torch.uint8).view(-1, layout.record)
    columns = records[:, : len(layout.labels)].long().unbind(dim=1)
    for labels, classes in zip(columns, layout.labels, strict=True):
        index = int(labels.argmax())
        if int(labels[index]) >= classes:
            raise ValueError(
                f"image {index} of {file.name} in {source} has the label {int(labels[index])}, expected one below "
                f"{classes}: the file is damaged or of another format, get {layout.archive} anew"
            )
    images = records[:, len(layout.labels) :].unflatten(1, _SHAPE)
    return Split(images, columns[-1], columns[0] if len(columns) > 1 else None)
