"""Damaged and hostile files of weights end in one sentence of ours, before anything in them is believed."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import msam_analysis as ma
from msam_analysis.checkpoints import reading, scanning
from msam_analysis.checkpoints.scanning import MOST_BYTES, CostlyError, scan
from tests.trust.cases import is_sentence

from . import damaged

FILES = 3000


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that are reached in a moment."""
    monkeypatch.setattr(scanning, "_MOST_INSTRUCTIONS", 20_000)
    monkeypatch.setattr(reading, "MOST_OBJECTS", 200)


def fate(path: Path) -> str:
    """Load a checkpoint: how that ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about old formats
        try:
            found = ma.checkpoints.load_weights(path)
        except (ValueError, FileNotFoundError) as error:
            assert str(error).startswith(str(path)) or str(path) in str(error), error  # noqa: PT017
            assert is_sentence(str(error)), error  # noqa: PT017
            return "refused"
    assert all(isinstance(value, torch.Tensor) for value in found.values())
    return "read"


@functools.cache
def whole(name: str) -> dict[str, bytes]:
    """The files of a whole checkpoint, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights")
        damaged.FORMATS[name][0](path)
        return {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", damaged.FORMATS)
def test_whole_ones_are_read(name: str, tmp_path: Path) -> None:
    put(tmp_path, whole(name))
    assert fate(tmp_path / "weights") == "read"


ENDS: Counter[str] = Counter()


@settings(max_examples=FILES, derandomize=True, deadline=None, database=None)
@given(name=st.sampled_from(sorted(damaged.FORMATS)), changes=damaged.CHANGES)
def damage(folder: Path, name: str, changes: list[damaged.Change]) -> None:
    files, inner = whole(name), damaged.FORMATS[name][1]
    hurt = str(Path("weights", inner)) if inner else "weights"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    put(folder, {**files, hurt: damaged.changed(files[hurt], changes)})
    ENDS[fate(folder / "weights")] += 1


def test_thousands_of_damaged_files(tmp_path: Path) -> None:
    ENDS.clear()
    damage(tmp_path / "folder")
    assert ENDS["refused"] > FILES / 2, ENDS
    assert ENDS["read"] > FILES / 50, ENDS


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("form", ["new", "old", "script"])
@pytest.mark.parametrize("what", damaged.PICKLES)
def test_pickles_that_ask_for_much(what: str, form: str, tmp_path: Path) -> None:
    pickled, message = damaged.PICKLES[what]
    path = tmp_path / "weights.pt"
    if form == "old":
        damaged.legacy(path, pickled)
    else:
        damaged.archive(path, pickled, more={"a/constants.pkl": b""} if form == "script" else {"a/data/0": bytes(16)})
    with pytest.raises(ValueError, match=rf"weights\.pt is no checkpoint: .*{message}.*check where it comes from"):
        ma.checkpoints.load_weights(path)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a long bytearray", "fills"),
        ("a place far out in the memo", "numbers an object"),
        ("tuples in tuples", "nests more than 100 tuples"),
        ("instructions without end", r"more than \d+ instructions"),
    ],
)
def test_descriptions_of_folders_that_ask_for_much(what: str, message: str, tmp_path: Path) -> None:
    damaged.distributed(tmp_path / "folder")
    (tmp_path / "folder" / ".metadata").write_bytes(damaged.PICKLES[what][0])
    with pytest.raises(ValueError, match=rf"cannot be read as a checkpoint of torch\.distributed .*{message}"):
        ma.checkpoints.load_weights(tmp_path / "folder")


def test_a_description_cannot_change_torchs_classes(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import Metadata

    damaged.distributed(tmp_path / "folder")
    build = b"\x80\x02c" + Metadata.__module__.encode() + b"\nMetadata\nN}X\x07\0\0\0hostileK\x01s\x86b."
    (tmp_path / "folder" / ".metadata").write_bytes(build)
    with pytest.raises(ValueError, match="sets what it has no business to set"):
        ma.checkpoints.load_weights(tmp_path / "folder")
    assert not hasattr(Metadata, "hostile")


@pytest.mark.parametrize("size", [[10**9, 10**9], [-4]])
def test_a_description_that_claims_more_than_the_folder_has(size: list[int], tmp_path: Path) -> None:
    damaged.distributed(tmp_path / "folder")
    path = tmp_path / "folder" / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301 -- written two lines above
    next(one for one in metadata.state_dict_metadata.values() if hasattr(one, "properties")).size = torch.Size(size)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"tensors claim -?\d+ bytes, where its files have"):
        ma.checkpoints.load_weights(tmp_path / "folder")


def test_a_tensor_of_gigabytes_from_four_bytes(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"w": torch.ones(1).expand(10**11)}, path)
    with pytest.raises(ValueError, match=r"its tensor 'w' claims 400000000000 bytes, where 4 are there"):
        ma.checkpoints.load_weights(path)
    torch.save({"w": torch.ones(1).expand(10**3)}, path)  # as an honest one may be
    assert ma.checkpoints.load_weights(path)["w"].shape == (1000,)


def test_tensors_without_values(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3, device="meta"), "step": torch.ones(1, device="meta")}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="its tensor 'w' has a shape and no values"):
        ma.checkpoints.load_weights(tmp_path / "weights.pt")


@pytest.mark.usefixtures("strict")
def test_more_tensors_than_a_network_has(tmp_path: Path) -> None:
    head = {f"{n:x}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(201)}
    text = json.dumps(head).encode()
    (tmp_path / "weights.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match="it holds 201 tensors, more than 200"):
        ma.checkpoints.load_weights(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("length", [10**18, 2**63, 2**64 - 1])
def test_a_safetensors_header_that_claims_more_than_there_is(length: int, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(struct.pack("<Q", length) + b'{"a": {}}')
    with pytest.raises(ValueError, match="is a safetensors file that was cut"):
        ma.checkpoints.load_weights(tmp_path / "weights.safetensors")


# --- archives


def test_an_archive_whose_list_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    damaged.archive(path, b"\x80\x02}.")
    content = bytearray(path.read_bytes())
    end = content.rfind(b"PK\x05\x06")
    content[end + 12 : end + 16] = struct.pack("<I", MOST_BYTES + 1)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="lists more files than a checkpoint has"):
        ma.checkpoints.load_weights(path)
    large = b"PK\x06\x06" + bytes(36) + struct.pack("<Q", 2**40) + bytes(8)
    content[end + 12 : end + 16] = struct.pack("<I", 2**32 - 1)
    path.write_bytes(bytes(content[:end]) + large + bytes(content[end:]))
    with pytest.raises(ValueError, match="lists more files than a checkpoint has"):
        ma.checkpoints.load_weights(path)


def test_a_compressed_archive(tmp_path: Path) -> None:
    """It would be mapped as it lies: zeros that unpack to gigabytes, or weights that are none."""
    path = tmp_path / "weights.pt"
    damaged.archive(path, damaged.storage(4), stored=zipfile.ZIP_DEFLATED, more={"a/data/0": bytes(10**6)})
    with pytest.raises(ValueError, match=r"is a torch\.save file that was compressed.*zip -0"):
        ma.checkpoints.load_weights(path)


def test_an_archive_that_claims_more_than_it_has(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    damaged.archive(path, damaged.storage(4), more={"a/data/0": bytes(16)})
    content = bytearray(path.read_bytes())
    place = content.rfind(b"PK\x01\x02")
    content[place + 24 : place + 28] = struct.pack("<I", 10**9)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="claims to hold more than it has"):
        ma.checkpoints.load_weights(path)


def test_two_descriptions(tmp_path: Path) -> None:
    """One would be looked through, and the other read."""
    path = tmp_path / "weights.pt"
    damaged.archive(path, b"\x80\x02}.", more={"b/data.pkl": damaged.storage(10**12)})
    with pytest.raises(ValueError, match=r"holds two descriptions \(data\.pkl\)"):
        ma.checkpoints.load_weights(path)


def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(damaged.state(), path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert ma.checkpoints.load_weights(path).keys() == damaged.state().keys()


# --- JSON and names


@pytest.mark.parametrize(
    "text", ["[" * 10**6, "{", "null", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "9" * 10_000, "\ufeff{}"]
)
def test_indices_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="is no index of shards"):
        ma.checkpoints.load_weights(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "", ".", "..", "a\0b", 3, None])
def test_shards_lie_beside_their_index(name: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match="expected names of tensors to files beside it"):
        ma.checkpoints.load_weights(tmp_path)


@pytest.mark.parametrize(
    "modules", ["{", "{}", "[3]", "[{}]", '[{"name": "0"}]', '[{"name": "0", "path": "../x"}]', "[" * 10**6]
)
def test_lists_of_modules_that_are_none(modules: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(modules)
    with pytest.raises(ValueError, match=r"modules\.json is no list of modules"):
        ma.checkpoints.load_weights(tmp_path)


@pytest.mark.parametrize("name", [".", "..", "../x", "a\0b", "\udcff", "x" * 10_000, ""])
def test_a_newest_folder_that_is_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "latest").write_bytes(os.fsencode(name))
    with pytest.raises(FileNotFoundError, match="this folder holds no weights"):
        ma.checkpoints.load_weights(tmp_path)


def test_folders_that_name_each_other(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "latest").write_text("a")
    (tmp_path / "a" / "b").symlink_to(tmp_path)
    (tmp_path / "a" / "latest").write_text("b")
    with pytest.raises(ValueError, match="names a folder that names another"):
        ma.checkpoints.load_weights(tmp_path)


def test_text_that_is_too_long_is_text_all_the_same(tmp_path: Path) -> None:
    for content in ("[" * 10**6, '{"a": ' + " " * (MOST_BYTES + 1) + "1}"):
        (tmp_path / "weights.bin").write_text(content)
        with pytest.raises(ValueError, match=r"is text \(JSON\)"):
            ma.checkpoints.load_weights(tmp_path / "weights.bin")


# --- looking through pickles


def test_names_are_found_in_every_protocol() -> None:
    import io
    from collections import OrderedDict

    for protocol in range(6):
        text = pickle.dumps([OrderedDict(a=1), OrderedDict(b=2), {"x": (1, 2)}], protocol)
        assert [name for name in scan(io.BytesIO(text), 100) if "copy_reg" not in name] == ["collections.OrderedDict"]


def test_a_pickle_that_is_too_long() -> None:
    import io

    texts: list[Callable[[], Any]] = [
        lambda: io.BytesIO(b"\x80\x02X" + struct.pack("<I", MOST_BYTES + 9) + bytes(MOST_BYTES + 9) + b"."),
        lambda: io.BytesIO(b"c" + b"a" * (MOST_BYTES + 9) + b"\n."),
    ]
    for text in texts:
        with pytest.raises(CostlyError, match="its pickle has more than 64 MiB"):
            scan(text(), 10**9)
