"""CIFAR's binary files: what is read, what is refused, and generated files of their format."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msam_analysis.studies import cifar
from msam_analysis.studies.cifar import Kind, generate, load

KINDS: tuple[Kind, ...] = ("cifar10", "cifar100")
FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}
TRAIN = {"cifar10": [f"data_batch_{n}.bin" for n in range(1, 6)], "cifar100": ["train.bin"]}
TEST = {"cifar10": "test_batch.bin", "cifar100": "test.bin"}
each_kind = pytest.mark.parametrize("kind", KINDS)


def record(kind: Kind, number: int) -> bytes:
    """A record by hand: image k shows k + channel in every pixel but the last, which is 200 + k."""
    label = bytes([number % 10]) if kind == "cifar10" else bytes([number % 20, 99 - number])
    planes = [bytes([number + channel]) * 1023 + bytes([200 + number]) for channel in range(3)]
    return label + b"".join(planes)


def write(folder: Path, kind: Kind) -> None:
    """Two records in every training file, three in the test file, numbered through."""
    inner = folder / FOLDERS[kind]
    inner.mkdir(parents=True)
    number = 0
    for name in TRAIN[kind]:
        (inner / name).write_bytes(record(kind, number) + record(kind, number + 1))
        number += 2
    (inner / TEST[kind]).write_bytes(b"".join(record(kind, number + k) for k in range(3)))
    (inner / "readme.html").write_text("not read")


def pack(folder: Path, kind: Kind) -> Path:
    archive = folder / FOLDERS[kind].replace("-batches-bin", "-binary")
    archive = archive.with_name(archive.name + ".tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / FOLDERS[kind], FOLDERS[kind])
    return archive


# --- reading


@each_kind
def test_records_by_hand(kind: Kind, tmp_path: Path) -> None:
    write(tmp_path, kind)
    data = load(tmp_path, kind, checksum="any")
    trained = 2 * len(TRAIN[kind])
    assert (data.kind, data.classes, data.published) == (kind, 10 if kind == "cifar10" else 100, False)
    assert data.source == tmp_path / FOLDERS[kind]
    for split, numbers in ((data.train, range(trained)), (data.test, range(trained, trained + 3))):
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert split.images.shape == (len(numbers), 3, 32, 32)
        assert split.labels.tolist() == [k % 10 if kind == "cifar10" else 99 - k for k in numbers]
        if kind == "cifar10":
            assert split.superclasses is None
        else:
            assert split.superclasses is not None
            assert split.superclasses.tolist() == [k % 20 for k in numbers]
        for image, k in zip(split.images, numbers, strict=True):
            assert image[:, 31, 31].tolist() == [200 + k] * 3
            assert image[:, 0, 31].tolist() == image[:, 31, 0].tolist() == [k, k + 1, k + 2]
            assert int(image.int().sum()) == 1023 * (3 * k + 3) + 3 * (200 + k)


def test_rows_are_rows(tmp_path: Path) -> None:
    """The first 32 bytes of a plane are the image's first row."""
    write(tmp_path, "cifar100")
    gradient = bytes([1, 2]) + bytes(row * 8 for row in range(32) for _ in range(32)) * 3
    (tmp_path / FOLDERS["cifar100"] / "train.bin").write_bytes(gradient)
    image = load(tmp_path, checksum="any").train.images[0]
    assert image[1, :, 5].tolist() == [row * 8 for row in range(32)]


@each_kind
@pytest.mark.parametrize(
    "place", ["the folder", "the folder around it", "the archive", "the folder around the archive"]
)
def test_places(kind: Kind, place: str, tmp_path: Path) -> None:
    write(tmp_path, kind)
    inner = tmp_path / FOLDERS[kind]
    expected = load(inner, kind, checksum="any")
    path = inner
    if "archive" in place:
        archive = pack(tmp_path, kind)
        path = archive.rename(tmp_path / "renamed.tgz") if place == "the archive" else tmp_path
        for file in inner.iterdir():
            file.unlink()
    elif place == "the folder around it":
        pack(tmp_path, kind).write_bytes(b"not looked at")
        path = tmp_path
    data = load(str(path), kind, checksum="any")
    assert data.source.is_dir() == ("archive" not in place)
    assert data.sha256 == expected.sha256
    for got, want in ((data.train, expected.train), (data.test, expected.test)):
        assert torch.equal(got.images, want.images)
        assert torch.equal(got.labels, want.labels)


@each_kind
def test_sums_are_those_of_the_files(kind: Kind, tmp_path: Path) -> None:
    write(tmp_path, kind)
    sums = load(tmp_path, kind, checksum="any").sha256
    assert list(sums) == [*TRAIN[kind], TEST[kind]]
    for name, digest in sums.items():
        assert digest == hashlib.sha256((tmp_path / FOLDERS[kind] / name).read_bytes()).hexdigest()


def test_images_are_in_memory_once(tmp_path: Path) -> None:
    """Views of the records; a batch of them is contiguous."""
    write(tmp_path, "cifar100")
    split = load(tmp_path, checksum="any").train
    assert split.images.untyped_storage().nbytes() == 2 * 3074
    assert split.images[torch.tensor([1, 0])].is_contiguous()


# --- the published files


def test_published_sizes_and_sums() -> None:
    """170,052,171 and 168,513,733 bytes to download; the archives' MD5 as on the data sets' home page."""
    ten, hundred = cifar._FORMATS["cifar10"], cifar._FORMATS["cifar100"]
    assert (ten.archive, ten.md5) == ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")
    assert (hundred.archive, hundred.md5) == ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8")
    assert [file.records * ten.record for file in ten.files] == [30_730_000] * 6
    assert [file.records * hundred.record for file in hundred.files] == [153_700_000, 30_740_000]
    sums = [file.sha256 for layout in (ten, hundred) for file in layout.files]
    assert len(set(sums)) == 8
    assert all(len(bytes.fromhex(digest)) == 32 for digest in sums)


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Kind], None]:
    """A function that takes files on the disk for the published ones."""

    def publish(folder: Path, kind: Kind) -> None:
        layout = cifar._FORMATS[kind]

        def known(file: Any) -> Any:
            content = (folder / FOLDERS[kind] / file.name).read_bytes()
            return dataclasses.replace(
                file, records=len(content) // layout.record, sha256=hashlib.sha256(content).hexdigest()
            )

        archive = folder / layout.archive
        md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest() if archive.exists() else ""
        formats = {
            **cifar._FORMATS,
            kind: dataclasses.replace(
                layout, train=tuple(known(file) for file in layout.train), test=known(layout.test), md5=md5
            ),
        }
        monkeypatch.setattr(cifar, "_FORMATS", formats)

    return publish


@each_kind
@pytest.mark.parametrize("packed", [False, True])
def test_published_files_are_known(
    kind: Kind, packed: bool, tmp_path: Path, publish: Callable[[Path, Kind], None]
) -> None:
    write(tmp_path, kind)
    archive = pack(tmp_path, kind)
    publish(tmp_path, kind)
    data = load(archive if packed else tmp_path, kind)
    assert data.published
    assert not load(archive if packed else tmp_path, kind, checksum="any").published
    assert len(data.train.labels) == 2 * len(TRAIN[kind])


@each_kind
@pytest.mark.parametrize("which", ["train", "test"])
def test_one_other_bit_is_refused(
    kind: Kind, which: str, tmp_path: Path, publish: Callable[[Path, Kind], None]
) -> None:
    write(tmp_path, kind)
    publish(tmp_path, kind)
    path = tmp_path / FOLDERS[kind] / (TRAIN[kind][-1] if which == "train" else TEST[kind])
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{path.name} has the published size but other content \(SHA-256 [0-9a-f]+\)"
    ):
        load(tmp_path, kind)
    assert not load(tmp_path, kind, checksum="any").published


def test_another_archive_is_refused(tmp_path: Path, publish: Callable[[Path, Kind], None]) -> None:
    """The same files, packed anew: its MD5 is another."""
    write(tmp_path, "cifar100")
    archive = pack(tmp_path, "cifar100")
    publish(tmp_path, "cifar100")
    archive.write_bytes(gzip.compress(gzip.decompress(archive.read_bytes()), compresslevel=1, mtime=1))
    with pytest.raises(ValueError, match=r"has the MD5 [0-9a-f]{32}, expected [0-9a-f]{32}, the published one of"):
        load(archive)
    assert len(load(archive, checksum="any").train.labels) == 2


# --- errors


def nothing(folder: Path) -> None:
    folder.mkdir(exist_ok=True)


def damaged(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        write(folder, "cifar100")
        change(folder / FOLDERS["cifar100"])

    return prepare


def damaged_archive(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        write(folder, "cifar100")
        archive = pack(folder, "cifar100")
        archive.write_bytes(change(archive.read_bytes()))
        for file in (folder / FOLDERS["cifar100"]).iterdir():
            file.unlink()

    return prepare


def label(fine: int, coarse: int) -> Callable[[Path], object]:
    return lambda inner: (inner / "test.bin").write_bytes(record("cifar100", 1) + bytes([coarse, fine]) + bytes(3072))


def with_link(folder: Path) -> None:
    """An archive whose train.bin is a link to something else."""
    write(folder, "cifar100")
    inner = folder / FOLDERS["cifar100"]
    with tarfile.open(folder / "cifar-100-binary.tar.gz", "w:gz") as tar:
        tar.add(inner / "test.bin", "cifar-100-binary/test.bin")
        link = tarfile.TarInfo("cifar-100-binary/train.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link, io.BytesIO())
    for file in inner.iterdir():
        file.unlink()


def claims_much(folder: Path) -> None:
    """An archive of a few bytes whose train.bin says that it has a terabyte."""
    folder.mkdir()
    member = tarfile.TarInfo("cifar-100-binary/train.bin")
    member.size = 2**40 // 3074 * 3074
    head = member.tobuf(format=tarfile.GNU_FORMAT)
    (folder / "cifar-100-binary.tar.gz").write_bytes(gzip.compress(head + bytes(1024)))


Checksum = Literal["published", "any"]
ERRORS: dict[str, tuple[Callable[[Path], None], Checksum, type[Exception], str]] = {
    "no folder": (lambda folder: None, "published", FileNotFoundError, "data, which does not exist: get that archive"),
    "an empty folder": (
        nothing,
        "published",
        FileNotFoundError,
        r"expected cifar-100-binary.tar.gz, or the folder cifar-100-binary extracted from it, at .*data: get that",
    ),
    "a file is missing": (
        damaged(lambda inner: (inner / "test.bin").unlink()),
        "any",
        FileNotFoundError,
        r"cifar-100-binary.test.bin is missing: extract all of cifar-100-binary.tar.gz",
    ),
    "not the published size": (
        damaged(lambda inner: None),
        "published",
        ValueError,
        r"train.bin has 6,148 bytes, expected 153,700,000 of the 50,000 published images: extract .* checksum='any'",
    ),
    "no whole record": (
        damaged(lambda inner: (inner / "train.bin").write_bytes(bytes(3073))),
        "any",
        ValueError,
        r"train.bin has 3,073 bytes, expected a multiple of 3,074, the bytes of one image and its labels: pass files",
    ),
    "nothing in a file": (
        damaged(lambda inner: (inner / "train.bin").write_bytes(b"")),
        "any",
        ValueError,
        "train.bin has 0 bytes, expected a multiple of 3,074",
    ),
    "a class too high": (
        damaged(label(100, 0)),
        "any",
        ValueError,
        r"image 1 of test.bin in .* has the label 100, expected one below 100: the file is damaged",
    ),
    "a superclass too high": (damaged(label(0, 20)), "any", ValueError, r"has the label 20, expected one below 20"),
    "another archive": (damaged_archive(lambda content: content), "published", ValueError, "has the MD5 "),
    "half an archive": (
        damaged_archive(lambda content: content[: len(content) // 2]),
        "any",
        ValueError,
        r"is not a whole .tar.gz archive \(.*\): get cifar-100-binary.tar.gz anew",
    ),
    "no archive": (damaged_archive(lambda content: b"text"), "any", ValueError, "is not a whole .tar.gz archive"),
    "an empty archive": (
        damaged_archive(lambda content: gzip.compress(bytes(10240))),
        "any",
        FileNotFoundError,
        "holds no cifar-100-binary/train.bin: pass cifar-100-binary.tar.gz",
    ),
    "a file that claims a terabyte": (
        claims_much,
        "any",
        ValueError,
        r"is not a whole .tar.gz archive \(cifar-100-binary/train.bin claims 1,099,511,\d+,\d+ bytes, more than",
    ),
    "a link": (with_link, "any", FileNotFoundError, "holds no cifar-100-binary/train.bin"),
}


@pytest.mark.parametrize(("prepare", "checksum", "kind", "sentence"), ERRORS.values(), ids=ERRORS)
def test_errors(
    prepare: Callable[[Path], None], checksum: Checksum, kind: type[Exception], sentence: str, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    prepare(folder)
    with pytest.raises(kind, match=sentence):
        load(folder, checksum=checksum)


def test_unknown_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the kind 'cifar10' or 'cifar100', got 'mnist'"):
        load(tmp_path, "mnist")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected the kind"):
        generate(tmp_path, "mnist")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected checksum 'published' or 'any', got 'none'"):
        load(tmp_path, checksum="none")  # type: ignore[arg-type]


def test_a_file_that_shrinks_while_it_is_read() -> None:
    with pytest.raises(EOFError, match="ended after 3 of 5 bytes"):
        cifar._fill(io.BytesIO(b"abc"), 5)


# --- generated files


@each_kind
def test_generated_files_have_the_format(kind: Kind, tmp_path: Path) -> None:
    written = generate(tmp_path, kind, train=203, test=101, seed=1)
    assert written == tmp_path / FOLDERS[kind]
    assert sorted(path.name for path in written.iterdir()) == sorted([*TRAIN[kind], TEST[kind], "GENERATED.txt"])
    assert "They are not CIFAR" in (written / "GENERATED.txt").read_text()
    with pytest.raises(ValueError, match="checksum='any'"):
        load(tmp_path, kind)
    data = load(tmp_path, kind, checksum="any")
    for split, count in ((data.train, 203), (data.test, 101)):
        shown = torch.bincount(split.labels, minlength=data.classes)
        assert int(shown.sum()) == count
        assert int(shown.max()) - int(shown.min()) <= 1
        assert not torch.equal(split.labels, torch.arange(count) % data.classes), "in random order"
        if split.superclasses is not None:
            assert torch.equal(split.superclasses, split.labels // 5)


@settings(max_examples=5)
@given(seed=st.integers(0, 2**40))
def test_generated_files_repeat(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    a, b, c = (tmp_path_factory.mktemp("data") for _ in range(3))
    for folder, number in ((a, seed), (b, seed), (c, seed + 1)):
        generate(folder, train=10, test=5, seed=number)
    assert load(a, checksum="any").sha256 == load(b, checksum="any").sha256 != load(c, checksum="any").sha256


def test_generating_draws_nothing_from_the_global_generators(
    generators: Callable[[], tuple[object, ...]], tmp_path: Path
) -> None:
    before = generators()
    generate(tmp_path, train=5, test=5)
    assert generators() == before


def test_generated_classes_can_be_learned(tmp_path: Path) -> None:
    """A linear classifier by least squares, on 20 images of every class: far above the 1 in 10 of a guess."""
    generate(tmp_path, "cifar10", train=1000, test=500, seed=2)
    data = load(tmp_path, "cifar10", checksum="any")

    def features(images: torch.Tensor) -> torch.Tensor:
        """Means over 4×4 squares, of the image and its mirror image; mirroring changes nothing in them."""
        means = torch.nn.functional.avg_pool2d(images.double() / 255 - 0.5, 4)
        flat = torch.cat([means + means.flip(3), (means - means.flip(3)).abs()], dim=1).flatten(1)
        return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)

    onehot = torch.nn.functional.one_hot(data.train.labels, 10).double()
    x = features(data.train.images)
    weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]).double(), x.T @ onehot)
    right = (features(data.test.images) @ weights).argmax(1) == data.test.labels
    assert 0.5 < float(right.double().mean()) <= 1


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    written = generate(tmp_path, train=5, test=5)
    before = (written / "train.bin").read_bytes()
    with pytest.raises(FileExistsError, match=r"cifar-100-binary exists already: remove it, or generate into another"):
        generate(tmp_path, train=6, test=5)
    assert (written / "train.bin").read_bytes() == before


@pytest.mark.parametrize(("train", "test"), [(4, 5), (5, 0)])
def test_too_few_to_generate(train: int, test: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"at least 5 training images and 1 test image, got {train} and {test}"):
        generate(tmp_path, "cifar10", train=train, test=test)
    assert not list(tmp_path.iterdir())
