"""Files of weights that torch itself would believe: what they claim is compared with what they have."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import msam_analysis as ma

load = ma.checkpoints.load_weights


class Call:
    """Is pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def repacked(path: Path, change: Any) -> None:
    """Write the archive of a network anew, with what ``change`` makes of its records."""
    torch.save(network().state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # of zipfile, about two of one name
        for name, content in records:
            for one in change(name, content):
                archive.writestr(name, one)


def views(count: int, numbers: int) -> dict[str, Any]:
    """Tensors of so many numbers from one number."""
    storage = torch.zeros(1).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)  # as torch.save does
    rebuild = torch._utils._rebuild_tensor_v2  # what torch.save names, too
    return {str(n): Call(rebuild, typed, 0, (numbers,), (0,), False, OrderedDict()) for n in range(count)}


def test_a_storage_that_is_shorter_than_it_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    repacked(path, lambda name, content: [content[:8] if name.endswith("/data/0") else content])
    with pytest.raises(ValueError, match="claims a storage of 96 bytes, where 8 are there"):
        load(path)


def test_a_storage_without_a_length(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    text = b"\x80\x02}U\x01w(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu\x88tQs."
    repacked(path, lambda name, content: [text if name.endswith("data.pkl") else content])
    with pytest.raises(ValueError, match="claims a storage without its length"):
        load(path)


def test_two_records_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    repacked(path, lambda name, content: [content, bytes(96)] if name.endswith("/data/0") else [content])
    with pytest.raises(ValueError, match="holds two records of one name"):
        load(path)


def test_many_tensors_that_together_claim_gigabytes(tmp_path: Path) -> None:
    torch.save(views(1000, 2**23), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"its tensors claim \d+ bytes, where 4 are there"):
        load(tmp_path / "w.pt")


def test_some_expanded_tensors_are_no_bomb(tmp_path: Path) -> None:
    torch.save(views(3, 1000), tmp_path / "w.pt")
    assert [tensor.numel() for tensor in load(tmp_path / "w.pt").values()] == [1000] * 3


def test_a_length_that_is_a_size(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    text = b"\x80\x02}U\x01wctorch\nFloatTensor\nctorch\nSize\n" + pickle.dumps((10**9,), 2)[2:-1] + b"\x85R\x85Rs."
    repacked(path, lambda name, content: [text if name.endswith("data.pkl") else content])
    with pytest.raises(ValueError, match="makes a tensor of 1000000000 numbers"):
        load(path)


def test_indices_outside_of_a_sparse_tensor(tmp_path: Path) -> None:
    parts = torch.full((1, 3), 99), torch.ones(3), (4,), False
    torch.save({"w": Call(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, parts)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load(tmp_path / "w.pt")
    assert not torch.sparse.check_sparse_tensor_invariants.is_enabled()
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "w.pt")
    assert torch.equal(load(tmp_path / "w.pt")["w"].to_dense(), torch.eye(3))


def test_a_tensor_that_torch_cannot_copy(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, which quantises elsewhere now
        scales = torch.ones(2), torch.zeros(2)
        torch.save(
            {"a": {"w": torch.quantize_per_channel(torch.ones(4, 2), *scales, 1, torch.qint8)}}, tmp_path / "w.pt"
        )
        for key in (None, "a"):
            with pytest.raises(ValueError, match=r"holds the tensor '(a\.)?w', which cannot be copied"):
                load(tmp_path / "w.pt", key=key)


def test_names_that_are_too_deep_or_long(tmp_path: Path) -> None:
    save_file({"a." * 200 + "w": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="lies deeper than a checkpoint goes"):
        load(tmp_path / "w.safetensors")
    save_file({"w" * 10**6: torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="holds no state dict that fits") as refused:
        ma.checkpoints.load_model(tmp_path / "w.safetensors", network)
    assert len(str(refused.value)) < 1000
    save_file({**network().state_dict(), "0." + "w" * 10**6: torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="1 unknown to the model") as refused:
        ma.checkpoints.load_model(tmp_path / "w.safetensors", network)
    assert len(str(refused.value)) < 1000


def test_a_module_is_no_factory(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "w.pt")
    with pytest.raises(TypeError, match="expected a function that returns the model, got a Sequential itself"):
        ma.checkpoints.load_model(tmp_path / "w.pt", network())
